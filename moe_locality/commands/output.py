"""How commands speak: JSON or rich text on stdout; progress, logs and errors on stderr."""

import contextlib
import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_locality.errors import BackendUnavailable, MoeLocalityError

if TYPE_CHECKING:
    from rich.console import Console

    from moe_locality.placement import Costs

INTERRUPTED = 130
WRONG_INPUT, NOT_POSSIBLE = 1, 2
PIPE_COLUMNS = 160
SHOWN = ("copies", "picks", "node_imbalance", "rank_imbalance", "straggler", "distinct")
STDOUT, STDERR = 1, 2
JSON_FLAG, DEBUG_FLAG = "--json", "--debug"
EVERYWHERE = {
    "as_json": Annotated[bool, typer.Option(JSON_FLAG, help="Print one JSON object on stdout.")],
    "debug": Annotated[bool, typer.Option(DEBUG_FLAG, help="Log more; show tracebacks.")],
}
"""Options of every command."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """``payload``: the JSON object. ``show`` prints it for people; None: the lines of ``text``.
    ``then`` does what comes after the result is safe and shown: its result has the whole payload,
    and shows only what is new."""

    payload: dict[str, Any]
    text: Sequence[str] = ()
    show: "Callable[[Console], None] | None" = None
    then: "Callable[[], Result] | None" = None


def as_command(body: Callable[..., Result]) -> Callable[..., None]:
    """Return the function for typer that runs ``body``, which prints nothing, and prints its
    result. It takes what ``body`` takes, and the options of every command."""

    def run(*, as_json: bool, debug: bool, **options: Any) -> None:
        logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("moe_locality").setLevel(logging.DEBUG if debug else logging.WARNING)
        try:
            with quiet_stdout():
                result = body(**options)
            present(result, as_json=as_json)
        except KeyboardInterrupt as stop:  # typer would end without a word, and without the JSON
            raise typer.Abort(str(stop)) from stop

    own = inspect.signature(body, eval_str=True).parameters.values()
    more = (
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in EVERYWHERE.items()
    )
    seen: Any = run
    seen.__signature__ = inspect.Signature([*own, *more])
    seen.__doc__, seen.__name__ = body.__doc__, body.__name__
    return run


def guard(
    body: Callable[[], Any], *, as_json: bool, debug: bool, reword: Callable[[str], str] = str
) -> int:
    """Run ``body``, turn what goes wrong into a message, and return the exit code. ``reword`` gets
    the message of an error of ours, and returns what to print."""
    try:
        code = body()
    except Exception as error:  # noqa: BLE001  the last place where an error can be told in words
        kind, words, code, expected = _told(error)
        if debug or not expected:
            traceback.print_exc(file=sys.stderr)
        if isinstance(error, MoeLocalityError):
            words = reword(words)
        return _report(kind, words, code, as_json)
    except KeyboardInterrupt:
        return _report("KeyboardInterrupt", "interrupted", INTERRUPTED, as_json)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code if isinstance(code, int) else 0


def in_flags(message: str, flags: Mapping[str, str], given: Sequence[str]) -> str:
    """Return the message with the flags of a command where it names arguments of a function, as the
    package's errors do: ``name: found``, ``name=value``, ``name = value`` or ``name=``. Plain words
    stay, and what stands in ``given``, the words of the command line, which are the user's.

    ``flags``: parameter of the command → its flag. A function may put ``num_`` before the name, or
    ``_size`` behind it."""
    known = dict(flags)
    for name, flag in flags.items():
        known.setdefault(f"num_{name}", flag)
        known.setdefault(f"{name}_size", flag)
    names = "|".join(known)
    if not names:
        return message
    message = re.sub(rf"(^|: )({names})(?=: found)", lambda m: m[1] + known[m[2]], message)

    def flag_of(match: re.Match[str]) -> str:
        if any(match[0] in word for word in given):
            return match[0]
        value = match["quoted"] or ""
        return known[match["name"]] + (" " if value or match["more"] is not None else "") + value

    value = r"(?:True\b|'(?P<quoted>[^']*)'|(?P<more>(?=[\w-])))?"
    return re.sub(rf"(?<![\w./-])(?P<name>{names}) ?= ?{value}", flag_of, message)


def _told(error: Any) -> tuple[str, str, int, bool]:
    """(type, message, exit code) as they are told, and whether such an error is expected."""
    kind, text = type(error).__name__, str(error)
    if kind in ("Abort", "KeyboardInterrupt"):
        return "KeyboardInterrupt", text or "interrupted", INTERRUPTED, True
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        # of the command line parser, whose class differs between releases of typer
        return "UsageError", error.format_message(), int(error.exit_code), True
    code = NOT_POSSIBLE if isinstance(error, BackendUnavailable) else WRONG_INPUT
    if isinstance(error, MoeLocalityError):
        return kind, text or kind, code, True
    if isinstance(error, MemoryError):  # what is read and asked for decides how much is needed
        words = f"found too little memory for this input{f' ({text})' if text else ''}, expected "
        return kind, f"{words}enough: correct a number that is too large, or use a part", code, True
    return kind, f"unexpected {kind}: {text or kind}", code, False


def _report(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        write_json({"error": {"type": kind, "message": message, "exit_code": code}})
    else:
        hint = " (see --help)" if kind == "UsageError" else ""
        sys.stderr.write(f"moe-locality: {message}{hint}\n")
    return code


def present(result: Result, *, as_json: bool) -> None:
    """Print a result on stdout, and what comes after it; as JSON one object, the last."""
    if as_json and result.then is None:
        write_json(result.payload)
    if not as_json:
        if result.text:
            sys.stdout.write("\n".join(result.text) + "\n")
        if result.show is not None:
            from rich.console import Console

            # Not a terminal: a log file or a pipe; no table should be cut to 80 columns there.
            width = None if sys.stdout.isatty() else PIPE_COLUMNS
            result.show(Console(file=sys.stdout, highlight=False, width=width))
        sys.stdout.flush()
    if result.then is not None:
        with quiet_stdout():
            after = result.then()
        present(after, as_json=as_json)


def published(payload: dict[str, Any], publish: Callable[[], dict[str, Any]]) -> Result:
    """Send a result elsewhere, for ``then``; ``publish`` returns more of the payload, and that it
    fails is a warning."""
    try:
        more = publish()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the result is not to be lost
        words = _told(error)[1]
        sys.stderr.write(f"moe-locality: warning: the result could not be published: {words}\n")
        more = {}
    lines = [f"{name}: {value}" for name, value in more.items()]
    return Result(payload={**payload, **more}, text=lines)


def write_json(payload: dict[str, Any]) -> None:
    """Write one JSON object and a newline on stdout; nan and infinity become null."""
    sys.stdout.write(json.dumps(plain(payload), allow_nan=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Return ``value`` with JSON's own types only: arrays become lists, paths strings."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send everything that is printed meanwhile to stderr, also by C code and child processes."""
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a process without a stdout has nothing to protect
            spare = os.dup(STDOUT)
            stack.callback(os.close, spare)
            stack.callback(os.dup2, spare, STDOUT)
            os.dup2(STDERR, STDOUT)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            sys.stderr.flush()


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a progress bar on stderr, if that is a terminal, while the body runs; it gets
    ``update(done, total, text)``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        task = bars.add_task(text, total=None)

        def update(done: int, total: int, words: str = "") -> None:
            bars.update(task, completed=done, total=total, description=words or text)

        yield update


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """Return a rich table; numbers are aligned right, and brackets stay brackets."""
    from rich.markup import escape
    from rich.table import Table

    from moe_locality.report import format_value

    shown = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    first = rows[0] if rows else [""] * len(columns)
    for name, value in zip(columns, first, strict=True):
        shown.add_column(name, justify="right" if isinstance(value, (int, float)) else "left")
    for row in rows:
        shown.add_row(*(escape(format_value(value)) for value in row))
    return shown


def brief(costs: "Costs") -> dict[str, Any]:
    """Return the costs without the values per layer."""
    return {name: value for name, value in costs.to_dict().items() if name != "per_layer"}


def costs_table(title: str, named: Mapping[str, dict[str, Any] | None]) -> Any:
    """Return a rich table of costs, a column per plan and the ratio of the last to the first."""
    known = {name: costs for name, costs in named.items() if costs is not None}
    rows = []
    transports = {costs.get("transport", "once_per_node") for costs in known.values()}
    for metric in SHOWN if transports == {"once_per_node"} else (*SHOWN, "idle", "crossing"):
        values = [costs[metric] for costs in known.values()]
        first, last = values[0], values[-1]
        ratio = round(last / first, 3) if first and last and len(values) > 1 else None
        rows.append((metric, *values, ratio))
    return table(title, ("", *known, "ratio"), rows)
