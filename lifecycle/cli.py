"""The `lifecycle` command: a table of commands, each imported only when it is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

COMMANDS = {
    "run": ("lifecycle.commands.run:run", "run a recipe; what is cached is not run again"),
    "plan": ("lifecycle.commands.run:plan", "show what a run would do, and why"),
    "serve": ("serving.cli:serve", "serve a bundle over HTTP, as OpenAI's API does"),
    "chat": ("serving.cli:chat", "talk to a bundle in the terminal"),
    "bench": ("lifecycle.commands.bench:main", "measure throughput and latency of an engine"),
    "recipes": ("lifecycle.commands.recipes:main", "list, show or copy the shipped recipes"),
    "stages": ("lifecycle.commands.stages:main", "list the stages, or the settings of one"),
    "runs": ("lifecycle.commands.runs:main", "list, show or compare past runs"),
    "inspect": ("lifecycle.commands.inspect:main", "show what an ONNX graph is made of"),
    "schema": ("lifecycle.commands.schema:main", "print the JSON schema of recipes, for editors"),
    "doctor": ("lifecycle.commands.doctor:main", "show what this machine and installation can do"),
    "gc": ("lifecycle.commands.gc:main", "free the space of old runs"),
}


def usage() -> str:
    """What `lifecycle --help` prints."""
    lines = [f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lifecycle COMMAND [ARGUMENT ...]",
            "",
            "One recipe takes a language model from raw text to an answered HTTP request.",
            "",
            *lines,
            "",
            "lifecycle COMMAND --help tells more; start with: lifecycle run quickstart",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from lifecycle import __version__

        print(f"lifecycle {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from lifecycle.pipeline.suggest import did_you_mean

        hint = did_you_mean(args[0], COMMANDS)
        print(f"error: no command '{args[0]}'{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return _call(args[0], args[1:])


def _call(name: str, args: list[str]) -> int:
    from lifecycle.errors import LifecycleError, MissingExtraError

    module, _, function = COMMANDS[name][0].partition(":")
    try:
        command: Callable[[list[str]], int] = getattr(import_module(module), function)
        return command(args)
    except LifecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        missing = MissingExtraError.explain(f"lifecycle {name}", error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        return missing.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
