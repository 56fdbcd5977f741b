"""The shell: ``effvlm demo | run | evaluate | compress | info``. People's side of things; what is computed is decided
elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run Hugging Face vision-language models smaller and faster on the machine you have.",
)
notes = Console(stderr=True)  # standard output belongs to results
_options = {"debug": False}

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML file with a recipe of several methods or steps.")]


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(version("effvlm"))
        raise typer.Exit


def _quiet() -> None:
    """For the demo model only: no bars for a load of milliseconds, no advice to install kernels for a model of this size."""
    from transformers.utils import logging

    if not _options["debug"]:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Options of every command."""
    _options["debug"] = debug


@app.command()
def demo(
    n: Annotated[int, typer.Option("--n", min=8, help="Held-out questions per row of the table.")] = 400,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the contact sheet.")] = Path("effvlm-demo"),
    images: Annotated[Path | None, typer.Option(help="Also answer questions about the pictures in this folder.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask the built-in demo VLM held-out questions, with all and with fewer visual tokens."""
    from effvlm.demo import show

    _quiet()
    result = show.run(notes, n=n, seed=seed, out=out, images=images)
    if as_json:
        print(json.dumps(result))
    else:
        show.print_tables(Console(), result)


@app.command()
def run(
    image: Annotated[Path, typer.Option(help="The picture.")],
    prompt: Annotated[str, typer.Option(help="The question about it.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of an image-text-to-text model; default: the demo VLM.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the visual tokens to keep, in (0, 1].")] = 1.0,
    method: Annotated[str, typer.Option(help="How: a method of effvlm.tokens.")] = "ToMe",
    recipe: RecipeFile = None,
    trace: Annotated[Path | None, typer.Option(help="Save a picture of what became of each patch here.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    as_json: JsonFlag = False,
) -> None:
    """Answer one question about a picture of yours."""
    from effvlm import ask, evaluation
    from effvlm.tokens import Recipe

    if model is None:
        _quiet()
    how = Recipe.from_yaml(recipe) if recipe else evaluation.method_named(method, keep) if keep != 1 else None
    result = ask.answer(notes, image=image, prompt=prompt, model=model, method=how, max_new_tokens=max_new_tokens, trace=trace)
    if as_json:
        print(json.dumps(result))
    else:
        print(result["answer"])
        notes.print(
            f"[dim]{result['visual_tokens_in']} → {result['visual_tokens_out']} visual tokens, {result['seconds']:.2f} s[/]"
        )


@app.command()
def evaluate(
    method: Annotated[list[str] | None, typer.Option(help="A method of effvlm.tokens; may be given several times.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the visual tokens that methods and controls keep, in (0, 1].")] = 0.25,
    recipe: RecipeFile = None,
    attention: Annotated[
        str, typer.Option(help="In the language model: plain, proportional (a token that stands for s counts s times), or both.")
    ] = "plain",
    controls: Annotated[bool, typer.Option(help="Also random, evenly spaced and pooled tokens of the same budget.")] = True,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of an image-text-to-text model; default: the demo VLM.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help='Questions for --model: lines of {"image": path, "question": …, "answer": …}.')
    ] = None,
    n: Annotated[int, typer.Option("--n", min=8, help="Held-out questions, for the demo VLM.")] = 400,
    seed: Annotated[int, typer.Option(help="Which held-out questions.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Test methods against the unmodified model and against controls, on the same questions, pair by pair."""
    from effvlm import evaluation

    if model is None:
        _quiet()
    outcomes = evaluation.run(
        notes,
        methods=method or [],
        keep=keep,
        recipe=recipe,
        attention=attention,
        controls=controls,
        model=model,
        data=data,
        n=n,
        seed=seed,
    )
    if as_json:
        print(json.dumps([o.to_dict() for o in outcomes]))
    else:
        evaluation.print_table(Console(), outcomes)


@app.command()
def compress(
    model: Annotated[Path, typer.Argument(help="Folder of a model with routed experts: config.json and safetensors.")],
    out: Annotated[Path, typer.Option(help="New folder for the result, or one with unfinished work of the same command.")],
    bits: Annotated[float | None, typer.Option(help="Bits per weight of the experts, 0.4 to 1.6; default 0.8.")] = None,
    method: Annotated[str | None, typer.Option(help="rtn (default), or gptq, which needs --calibration.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with a recipe's fields.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text file whose first 32,768 tokens calibrate.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Memory for weights under way, such as 4GB; default 1 GiB.")] = None,
    activations: Annotated[str | None, typer.Option(help="exact (default), or int8: about 1.5 times as fast.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin again instead of going on.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Store a model's routed experts below one bit per weight; run again after an interruption, it goes on."""
    from effvlm.compression import shell

    given = {"target_bits": bits, "method": method, "activations": activations}
    fields = {name: value for name, value in given.items() if value is not None}
    report = shell.run(
        notes, model=model, out=out, fields=fields, recipe=recipe, calibration=calibration, max_memory=max_memory, restart=restart
    )
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        shell.print_table(Console(), report)


@app.command()
def info(as_json: JsonFlag = False) -> None:
    """Versions, the kernels in use, what this machine lacks and why."""
    from effvlm import _info

    facts = _info.facts()
    if as_json:
        print(json.dumps(facts))
    else:
        _info.print_facts(Console(), facts)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: every expected error is one line on standard error and exit code 1; Ctrl-C is 130."""
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="effvlm", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130  # typer returns the same
    except Exception as error:
        code = _report(error)
    if code == 130:
        notes.print("effvlm: interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception) -> int:
    if _options["debug"]:
        raise error
    if hasattr(error, "format_message"):  # a wrong option: typer's own sentence, which names the nearest one
        text, code = error.format_message(), 2
    else:
        text, code = f"{error}" or type(error).__name__, 1
    notes.print(f"effvlm: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)
    return code
