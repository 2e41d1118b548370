"""A way to run somebody else's method on an object of which some attributes are other ones."""

from typing import Any


class View:
    """An object seen with some attributes replaced; what is written goes to the object itself.

    It lets DeepSpeed's own ``forward`` run with, say, another order of the router rows, without a
    copy of its code here.
    """

    def __init__(self, target: Any, **replaced: Any) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_replaced", replaced)

    def __getattr__(self, name: str) -> Any:
        replaced = object.__getattribute__(self, "_replaced")
        return (
            replaced[name]
            if name in replaced
            else getattr(object.__getattribute__(self, "_target"), name)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_target"), name, value)
