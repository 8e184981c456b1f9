"""`medgemma-run generate`: an answer about images, printed as it comes."""

import math
from pathlib import Path
from typing import Annotated

import typer

from medgemma_runtime.command import printable
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.generate import GenerateOptions, Generator
from medgemma_runtime.images import load_image
from medgemma_runtime.prompt import Image, Message, Text, split_thinking
from medgemma_runtime.terminal import ArtifactPath, AsJson, Threads, open_whole, print_json, read_text

__all__ = ["EXAMPLES", "generate"]

EXAMPLES = (
    "Examples:\n\n"
    'medgemma-run generate out/medgemma-int4 --image film.dcm --prompt "Describe this chest x-ray."\n\n'
    "medgemma-run generate out/medgemma-int4 --image before.png --image after.png --prompt-file question.txt "
    "--max-tokens 300 --json\n\n"
    'medgemma-run generate out/gemma3-270m-int4 --raw --prompt "The most common causes of chest pain are"'
)

_DEFAULTS = GenerateOptions()
_SPACES_FOR_TAB = " " * 4


def generate(
    artifact: ArtifactPath,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file, DICOM or other; may be repeated.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The question; it follows the images.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text with the question.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions before everything else.")] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Go on with the text as it stands: for base models, which know no chat."),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens at most, a thought's included.")
    ] = _DEFAULTS.max_tokens,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the most probable token; higher varies more.")
    ] = _DEFAULTS.temperature,
    top_k: Annotated[
        int, typer.Option(min=1, help="Above temperature 0: draw among so many tokens.")
    ] = _DEFAULTS.top_k,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Above temperature 0: of these, up to this probability.")
    ] = _DEFAULTS.top_p,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the draw; the same seed gives the same answer.")
    ] = _DEFAULTS.seed,
    threads: Threads = None,
    as_json: AsJson = False,
    thoughts: Annotated[
        bool, typer.Option("--thoughts", help="Print what the model thought, before the answer.")
    ] = False,
) -> None:
    """Answer a question about images, or about text alone. Not for diagnosis.

    The answer is printed as it comes, with --json when it is complete. Ctrl-C ends it.
    """
    if prompt is not None and prompt_file is None:
        question = prompt
    elif prompt_file is not None and prompt is None:
        question = read_text(prompt_file)
    else:
        raise EdgeError("generate needs one question; give either --prompt or --prompt-file")
    if not question.strip():
        raise EdgeError("the question has no word in it; give a text")
    if not math.isfinite(temperature) or not top_p > 0:
        raise EdgeError("--temperature must be a finite number and --top-p above 0; give others")
    options = GenerateOptions(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    paths = image or []
    if raw and (paths or system is not None):
        raise EdgeError("--raw goes on with a text alone; leave --image and --system out, or --raw")
    message = Message(role="user", parts=(*(Image() for _ in paths), Text(question)))
    printer = _Printer(thoughts=thoughts)
    with Generator(open_whole(artifact), threads=threads) as generator:
        images = [load_image(path) for path in paths]
        try:
            on_text = None if as_json else printer
            if raw:
                result = generator.complete(question, options=options, on_text=on_text)
            else:
                result = generator.generate(
                    [message], images, system=system, options=options, on_text=on_text
                )
        finally:
            printer.end_line()
    if as_json:
        thinking = split_thinking(result.text)
        print_json(
            {
                "text": thinking.answer,
                "thought": thinking.thought,
                "ended": result.ended,
                "tokens": {"prompt": result.prompt_tokens, "answer": len(result.ids)},
                "milliseconds": {
                    "images": result.images_ms,
                    "prefill": result.prefill_ms,
                    "decode": result.decode_ms,
                },
            }
        )
    elif result.ended == "length":
        typer.echo(
            f"cut off after {len(result.ids)} tokens, the most that --max-tokens or the model allow", err=True
        )


class _Printer:
    """Prints an answer that comes in pieces, and the thought before it only if asked."""

    def __init__(self, *, thoughts: bool) -> None:
        self._thoughts = thoughts
        self._text = self._printed = ""

    def __call__(self, piece: str) -> bool:
        self._text += piece
        thinking = split_thinking(self._text)
        shown = thinking.answer
        if self._thoughts and thinking.thought:
            shown = f"{thinking.thought}\n\n{shown}".rstrip()
        if shown.startswith(self._printed):
            new = shown[len(self._printed) :]
        else:
            # What was taken for the answer was a thought, or its label: what is printed stays printed.
            new = f"\n\n{shown}"
        typer.echo(printable(new.replace("\t", _SPACES_FOR_TAB)), nl=False)
        self._printed = shown
        return True

    def end_line(self) -> None:
        """End the line if anything was printed, after an interruption too."""
        if self._printed:
            typer.echo()
