"""`medgemma-run`: what an artifact does, from the command line."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from medgemma_runtime.answer import EXAMPLES, generate
from medgemma_runtime.artifact import Artifact
from medgemma_runtime.command import CHECK_FAILED, printable, run_app
from medgemma_runtime.embed import Embedder, ZeroShot, top_k, zero_shot
from medgemma_runtime.errors import ArtifactError, EdgeError
from medgemma_runtime.files import check_destination, replacing
from medgemma_runtime.image_index import ImageIndex, folder_files, index_folder
from medgemma_runtime.images import load_image
from medgemma_runtime.inspection import inspect_artifact
from medgemma_runtime.manifest import read_manifest
from medgemma_runtime.terminal import (
    ArtifactPath,
    AsJson,
    Threads,
    counting_bar,
    open_whole,
    print_json,
    read_text,
)

__all__ = ["app", "main"]

_BYTES_PER_MB = 1_000_000

app = typer.Typer(
    help="Runs an artifact that medgemma-export made. Not for diagnosis.",
    epilog='Example: medgemma-run classify out/medsiglip-int8 chest.dcm --label "a chest radiograph" '
    '--label "a head CT"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command(epilog=EXAMPLES)(generate)
app.command("inspect", epilog="Example: medgemma-run inspect out/medgemma-coreml-int4")(inspect_artifact)


def main() -> int:
    """The command line; returns its exit code."""
    return run_app(app)


@app.command(epilog="Example: medgemma-run info out/medsiglip-int8")
def info(artifact: ArtifactPath, as_json: AsJson = False) -> None:
    """Show what an artifact is, from its manifest alone."""
    opened = Artifact(directory=artifact, manifest=read_manifest(artifact))
    manifest = opened.manifest
    if as_json:
        print_json(
            {
                "directory": str(artifact),
                "manifest_sha256": opened.manifest_sha256,
                "size_bytes": opened.size_bytes,
                "manifest": asdict(manifest),
            }
        )
        return
    quantization = manifest.quantization
    facts = Table.grid(padding=(0, 2))
    for name, value in {
        "model": f"{manifest.model.id} ({manifest.model.architecture})",
        "revision": manifest.model.revision or "unknown",
        "adapter": manifest.model.adapter.name if manifest.model.adapter else "none",
        "target": f"{manifest.target}, {manifest.precision}",
        "quantization": f"{quantization.scheme}, {quantization.method}, activations "
        f"{quantization.activations}, {quantization.bits_per_weight:.2f} bits per weight",
        "size": f"{opened.size_bytes / _BYTES_PER_MB:.1f} MB in {len(manifest.files)} files",
        "identity": opened.manifest_sha256,
        "licence": manifest.model.licence,
        "intended use": manifest.model.intended_use,
    }.items():
        facts.add_row(Text(name, style="bold"), Text(printable(value), overflow="fold"))
    Console().print(facts)
    headings = ("component", "", "tensor", "type", "shape")
    tensors = Table(*(Column(heading, overflow="fold") for heading in headings), box=None)
    for component, entry in manifest.components.items():
        for direction, specs in (("in", entry.inputs), ("out", entry.outputs)):
            for spec in specs:
                shape = " x ".join(str(dim) for dim in spec.shape)
                cells = (component, direction, spec.name, spec.dtype, shape)
                tensors.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(tensors)


@app.command("verify", epilog="Example: medgemma-run verify out/medsiglip-int8")
def verify_command(artifact: ArtifactPath, as_json: AsJson = False) -> None:
    """Hold every file against its SHA-256; exit with 1 if one differs, is missing or is unlisted."""
    if not artifact.is_dir():
        raise EdgeError(f"{artifact} is not a directory; give the one medgemma-export wrote")
    problem = None
    try:
        open_whole(artifact)
    except ArtifactError as error:
        problem = str(error)
    if as_json:
        print_json({"directory": str(artifact), "is_whole": problem is None, "problem": problem})
    elif problem is None:
        typer.echo(f"{artifact} is whole")
    else:
        typer.echo(printable(f"{artifact} is not whole: {problem}"), err=True)
    if problem is not None:
        raise typer.Exit(CHECK_FAILED)


@app.command(
    epilog="Examples:\n\n"
    'medgemma-run classify out/medsiglip-int8 film.dcm --label "a chest x-ray with effusion" '
    '--label "a normal chest x-ray"\n\n'
    "medgemma-run classify out/medsiglip-int8 *.png --labels labels.txt --top 3 --json"
)
def classify(
    artifact: ArtifactPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, DICOM among them.")],
    label: Annotated[
        list[str] | None, typer.Option(help="A label, best a short sentence; may be repeated.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text with one label a line.")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Show only the N labels that fit best.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Tell which labels fit an image, without training.

    softmax compares the labels with each other and adds up to 1 whatever the image shows; sigmoid
    judges each label alone and is low for all of them when none fits.
    """
    if label and labels is None:
        names = label
    elif labels is not None and not label:
        names = _read_labels(labels)
    else:
        raise EdgeError("classify needs labels; give either --label, once for each, or --labels")
    with (
        Embedder(open_whole(artifact), threads=threads) as embedder,
        counting_bar("classifying", len(names) + len(images)) as advance,
    ):
        text_embeddings = embedder.embed_labels(names, progress=advance)
        image_embeddings = _embed_files(embedder, images, advance)
        answer = zero_shot(image_embeddings, text_embeddings, embedder.similarity)
    ranks = np.argsort(-answer.logits, axis=1, kind="stable")[:, :top]
    if as_json:
        print_json({"images": _classes(images, names, answer, ranks)})
        return
    for row, path in enumerate(images):
        # Above the table and not its title, which is wrapped to the table's width.
        typer.echo(printable(str(path)))
        table = Table("softmax", "sigmoid", "label")
        for column in ranks[row]:
            table.add_row(
                f"{answer.softmax_over_labels[row, column]:.3f}",
                f"{answer.sigmoid_per_label[row, column]:.3f}",
                Text(printable(names[column])),
            )
        Console().print(table)


@app.command(
    epilog="Examples:\n\n"
    "medgemma-run embed out/medsiglip-int8 --image a.png --image b.dcm --out images.npy\n\n"
    'medgemma-run embed out/medsiglip-int8 --text "a chest x-ray" --json'
)
def embed(
    artifact: ArtifactPath,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image file, DICOM or other; may be repeated.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="Write float32 [N, D] here.")] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write embeddings of unit length, of images or of texts, in the order given."""
    if bool(image) == bool(text):
        raise EdgeError("embed takes images or texts; give either --image or --text")
    if (out is None) != as_json:
        raise EdgeError("embed needs one place for its result; give either --out or --json")
    if out is not None:
        check_destination(out)
    sources = [str(source) for source in image or text or []]
    with (
        Embedder(open_whole(artifact), threads=threads) as embedder,
        counting_bar("embedding", len(sources)) as advance,
    ):
        if image:
            embeddings = _embed_files(embedder, image, advance)
        else:
            embeddings = embedder.embed_texts(sources, progress=advance)
    if out is None:
        rows = zip(sources, embeddings.tolist(), strict=True)
        print_json({"embeddings": [{"source": name, "embedding": row} for name, row in rows]})
        return
    with replacing(out) as stream:
        np.save(stream, embeddings)
    typer.echo(f"wrote float32 {list(embeddings.shape)} to {out}")


@app.command(
    epilog="Example: medgemma-run index out/medsiglip-int8 films --out films.npz\n\n"
    "Run it again after files were added, or after it was stopped: only new content is embedded. Until then "
    "a stopped run keeps its embeddings in INDEX.partial."
)
def index(
    artifact: ArtifactPath,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Searched with subfolders.")],
    out: Annotated[Path, typer.Option(metavar="INDEX", help="Where to write; read first if it exists.")],
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files that are no image, and name them.")
    ] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Embed every image below a folder into one file. Of a DICOM file the first frame counts."""
    if out.resolve().is_relative_to(folder.resolve()):
        raise EdgeError(f"{out} lies in the folder to be indexed; write the index elsewhere")
    check_destination(out)
    # Apart from the index, so that a search never takes a part for the whole.
    partial = out.with_name(f"{out.name}.partial")
    earlier = [ImageIndex.load(path) for path in (out, partial) if path.exists()]
    with (
        Embedder(open_whole(artifact), threads=threads) as embedder,
        counting_bar("indexing", len(folder_files(folder))) as advance,
    ):
        report = index_folder(
            embedder,
            folder,
            earlier=earlier,
            skip_bad=skip_bad,
            keep=lambda made: made.save(partial),
            progress=advance,
        )
    report.index.save(out)
    partial.unlink(missing_ok=True)
    if as_json:
        print_json(
            {
                "index": str(out),
                "images": len(report.index.names),
                "embedded": report.embedded,
                "reused": report.reused,
                "skipped": [{"name": name, "reason": reason} for name, reason in report.skipped],
            }
        )
        return
    typer.echo(
        f"wrote {len(report.index.names)} images to {out}: "
        f"{report.embedded} embedded, {report.reused} known already"
    )
    if report.skipped:
        typer.echo(f"skipped {len(report.skipped)} files that are no image:")
        for _, reason in report.skipped:
            typer.echo(printable(f"  {reason}"))


@app.command(
    epilog="Examples:\n\n"
    'medgemma-run search out/medsiglip-int8 films.npz --text "a fracture of the ankle"\n\n'
    "medgemma-run search out/medsiglip-int8 films.npz --image query.png -k 10 --json"
)
def search(
    artifact: ArtifactPath,
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="Made by medgemma-run index.")],
    image: Annotated[Path | None, typer.Option(help="Find images like this one.")] = None,
    text: Annotated[str | None, typer.Option(help="Find images that this describes.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show at most.")] = 5,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Find the images of an index that are nearest to an image or a text."""
    if (image is None) == (text is None):
        raise EdgeError("search takes one query; give either --image or --text")
    opened = open_whole(artifact)
    images = ImageIndex.load(index)
    images.check_artifact(opened.manifest_sha256)
    with Embedder(opened, threads=threads) as embedder, counting_bar("searching", 1) as advance:
        if image is not None:
            query = _embed_files(embedder, [image], advance)[0]
        else:
            query = embedder.embed_texts([text or ""], progress=advance)[0]
    rows, cosines = top_k(query, images.embeddings, min(k, len(images.names)))
    found = [(images.names[row], float(cosine)) for row, cosine in zip(rows, cosines, strict=True)]
    if as_json:
        print_json({"images": [{"name": name, "cosine": cosine} for name, cosine in found]})
        return
    table = Table("cosine", "image", box=None)
    for name, cosine in found:
        table.add_row(f"{cosine:.4f}", Text(printable(name), overflow="fold"))
    Console().print(table)


def _embed_files(
    embedder: Embedder, paths: Sequence[Path], advance: Callable[[int], None]
) -> NDArray[np.float32]:
    """Embed files one at a time, so that no more than one decoded image is held."""
    rows = [embedder.embed_images([load_image(path)], progress=advance) for path in paths]
    return np.concatenate(rows)


def _classes(
    paths: Sequence[Path], labels: Sequence[str], answer: ZeroShot, ranks: NDArray[np.int64]
) -> list[dict[str, object]]:
    """For each image its labels, the best first, as the JSON output states them."""
    return [
        {
            "path": str(path),
            "labels": [
                {
                    "label": labels[column],
                    "logit": float(answer.logits[row, column]),
                    "softmax_over_labels": float(answer.softmax_over_labels[row, column]),
                    "sigmoid_per_label": float(answer.sigmoid_per_label[row, column]),
                }
                for column in ranks[row]
            ],
        }
        for row, path in enumerate(paths)
    ]


def _read_labels(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
