"""What the commands of the command line do: one function each, options in, :class:`Result` out.

A function here prints nothing: it returns the JSON object of ``--json`` and how to show it to
people.
"""

import importlib
from typing import Any

import typer

_HOME_OF = {
    "import": "interchange",
    "export": "interchange",
    "analyze": "traces",
    "record": "traces",
    "place": "place",
    "group": "plans",
    "evaluate": "plans",
    "simulate": "simulate",
    "bake": "plans",
    "bench": "plans",
    "compare": "reports",
    "report": "reports",
    "demo": "demo",
    "doctor": "doctor",
}


def run(name: str, options: dict[str, Any]) -> None:
    """Run a command with the options that ``cli.py`` took, and print its result."""
    from moe_locality.commands.output import present, quiet_stdout, set_up_logging

    settings = dict(options)
    as_json, debug = settings.pop("as_json"), settings.pop("debug")
    set_up_logging(debug=debug)
    module = importlib.import_module(f"moe_locality.commands.{_HOME_OF[name]}")
    body = getattr(module, f"{name}_" if name == "import" else name)
    try:
        with quiet_stdout():
            result = body(**settings)
        present(result, as_json=as_json)
    except KeyboardInterrupt as stop:  # typer would end without a word, and without the JSON
        raise typer.Abort(str(stop)) from stop
