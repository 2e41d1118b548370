"""The command line: ``moe-locality COMMAND ...``.

The commands are functions of :mod:`moe_locality.commands`, which import what they need when they
run, so that ``--help`` answers at once. With ``--json`` a command prints one JSON object on stdout
and nothing else there, also when it fails: ``{"error": {"type", "message"}}``.

Exit codes: 0 done; 1 the input is wrong or does not fit; 2 wrong usage, or something that was asked
for is not available here; 130 interrupted.
"""

import io
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moe_locality.commands import doctor, place, plans, reports, serve, traces
from moe_locality.commands.output import DEBUG_FLAG, JSON_FLAG, as_command, guard, in_flags


class _Commands(TyperGroup):
    """The group of commands; reports usage errors in the form that ``--json`` promises."""

    def main(
        self, args: Sequence[str] | None = None, *_: Any, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        code = guard(
            lambda: super(_Commands, self).main(words, standalone_mode=False, **extra),
            as_json=JSON_FLAG in words,
            debug=DEBUG_FLAG in words,
            reword=lambda message: in_flags(message, self._flags(words), words),
        )
        if standalone_mode:
            sys.exit(code)
        return code

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Take two words for a command where there is one: ``bench paper``."""
        name = " ".join(args[:2])
        if len(args) > 1 and name in self.commands:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)

    def _flags(self, words: Sequence[str]) -> dict[str, str]:
        """Parameter of the command that ``words`` name → its longest flag."""
        pairs = map(" ".join, pairwise(words))
        names = [word for word in (*pairs, *words) if word in self.commands]
        known = self.commands[names[0]].params if names else []
        flags = {str(one.name): max(one.opts, key=len) for one in known}
        return {name: flag for name, flag in flags.items() if flag.startswith("--")}


app = typer.Typer(
    name="moe-locality",
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Put the experts of a mixture-of-experts model where their tokens are.",
    epilog="Words and formats: docs/design.md, docs/formats.md. Every command takes --json.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from moe_locality import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _body in (
    traces.import_,
    plans.export,
    traces.analyze,
    place.place,
    plans.group,
    plans.evaluate,
    plans.simulate,
    plans.bake,
    reports.compare,
    reports.report,
    traces.record,
    plans.bench,
    plans.bench_paper,
    serve.serve,
    doctor.doctor,
    reports.demo,
):
    app.command(_body.__name__.rstrip("_").replace("_", " "))(as_command(_body))


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name in other letters is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
