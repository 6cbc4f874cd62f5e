"""Commands that open the training wing: the stages of a model's life, from pretraining to what is served.

Each imports the wing when it is called, and says which extra is missing where it is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saccade.errors import InvalidInput, SaccadeError

STAGES = ("pretrain", "encode", "finetune", "upcycle", "adapt")
PASSED: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True}


@contextmanager
def wing() -> Iterator[None]:
    """The training wing stands on packages that serving does without."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SaccadeError(f"{error.name} is not installed: pip install 'saccade[train]'") from error


def stage(name: str, context: typer.Context) -> None:
    """Hand everything behind the name to the stage."""
    with wing():
        from training.stages import command

        command.run(name, context.args)


def pretrain(context: typer.Context) -> None:
    """Train a transformer to denoise pictures of classes. --help explains every field."""
    stage("pretrain", context)


def encode(context: typer.Context) -> None:
    """Write the latents of pictures to shards, for pretrain. --help explains every field."""
    stage("encode", context)


def finetune(context: typer.Context) -> None:
    """Train a model to see: depth, flow, amodal. --help explains every field."""
    stage("finetune", context)


def upcycle(context: typer.Context) -> None:
    """Make experts of a dense model and train on. --help explains every field."""
    stage("upcycle", context)


def adapt(context: typer.Context) -> None:
    """Train adapters for tasks on a frozen model. --help explains every field."""
    stage("adapt", context)


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file of training/configs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; one that was cut short goes on.")],
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1.", show_default="a GPU where there is one")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: every core this process may use.")] = 0,
) -> None:
    """Train the default model. Needs the extra `train`."""
    if not recipe.is_file():
        raise InvalidInput(f"no such file: {recipe}", param="recipe")
    with wing():
        from training import train as training
    chosen = [] if device is None else ["--device", device]
    training.main([str(recipe), "--out", str(out), "--threads", str(threads), *chosen])


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="Model repository to write into.")],
    name: Annotated[
        str | None, typer.Option(help="The model's name there.", show_default="the facts', else the run's folder's")
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(help="JSON put over what the run says: summary, licence, tasks, training.", show_default=False),
    ] = None,
    weights: Annotated[Literal["average", "model"], typer.Option(help="Averaged weights, or as they are.")] = "average",
    step: Annotated[int | None, typer.Option(help="Which checkpoint.", show_default="the newest")] = None,
    torchscript: Annotated[
        Path | None,
        typer.Option(help="Repository that also gets the model as NAME-torchscript, for Triton's backend pytorch."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights, for the card.", show_default="the facts', else unknown")
    ] = None,
) -> None:
    """Make a servable model of a run: ONNX graphs, checked against torch. Needs the extra `train`."""
    with wing():
        from training.stages import exporting
    card = exporting.export_run(
        run, repository, name=name, facts=facts, which=weights, step=step, torchscript=torchscript, licence=licence
    )
    typer.echo(
        f"{card.name}: {card.parameters / 1e6:.1f} M parameters, digest {card.digest[:12]}, licence {card.licence}"
    )
    typer.echo(f"serve it: saccade serve --model-repository {repository} --model {card.name}")


def scaling(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML of a study: what is varied, and how long each runs.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs, the tables and the plots.")],
    only: Annotated[
        list[str] | None, typer.Option(help="This axis alone; may be repeated.", show_default="all")
    ] = None,
    data: Annotated[str, typer.Option(help="What {data} stands for in the file.", show_default=False)] = "",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each run.")] = 1,
) -> None:
    """Train a sweep of models, count their work, fit power laws, plot. Needs the extra `train`."""
    if not config.is_file():
        raise InvalidInput(f"no such file: {config}", param="config")
    with wing():
        from training import study
    study.main(config, out, threads, only=tuple(only or ()), data=data)


def import_(
    source: Annotated[str, typer.Argument(metavar="PATH", help="File or folder of a checkpoint, or a hub's name.")],
    repository: Annotated[
        Path | None,
        typer.Argument(metavar="[REPOSITORY]", help="Repository to serve it from.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name there.", show_default=False)] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Also (or only) write a run that stages start from.", show_default=False)
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="meta-dit, diffusers-dit, dit-moe, generalist or marigold.", show_default="found by its weights' names"
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="Folder or hub's name of its autoencoder.", show_default=False),
    ] = None,
    torchscript: Annotated[
        Path | None, typer.Option(help="Repository that also gets it as NAME-torchscript.", show_default=False)
    ] = None,
    dtr: Annotated[
        bool, typer.Option("--dtr", help="It was trained with Denoising Task Routing, and its file does not say so.")
    ] = False,
    dtr_alpha: Annotated[
        float | None, typer.Option(help="Routing's alpha.", show_default="by its file, else 4")
    ] = None,
    dtr_beta: Annotated[
        float | None, typer.Option(help="Routing's beta.", show_default="by its file, else 0.8")
    ] = None,
    active: Annotated[int | None, typer.Option(min=1, help="Experts that see a token.", show_default="2")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of attention.", show_default="by the width")] = None,
    grid: Annotated[
        int | None, typer.Option(help="Tokens along an edge, in training.", show_default="by its file")
    ] = None,
    schedule: Annotated[
        Literal["linear", "scaled_linear", "cosine"] | None,
        typer.Option(help="Noise schedule.", show_default="its kind's"),
    ] = None,
    prediction: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None,
        typer.Option(help="What it predicts.", show_default="its kind's"),
    ] = None,
    zero_terminal_snr: Annotated[
        bool | None, typer.Option(help="Whether the last timestep is pure noise.", show_default="its kind's")
    ] = None,
    beta_start: Annotated[float | None, typer.Option(help="First beta.", show_default="its kind's")] = None,
    beta_end: Annotated[float | None, typer.Option(help="Last beta.", show_default="its kind's")] = None,
    start: Annotated[
        Literal["noise", "zeros"] | None, typer.Option(help="Where sampling starts.", show_default="its kind's")
    ] = None,
    spacing: Annotated[
        Literal["leading", "linspace", "trailing"] | None,
        typer.Option(help="Spacing of the timesteps for callers who ask for none.", show_default="its kind's"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps for callers who ask for none.", show_default="its kind's")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=0, help="Longer edge in pixels for callers who ask for none.", show_default="its kind's"),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the weights.", show_default="its kind's")] = None,
) -> None:
    """Bring a checkpoint of the world's in: to serve, to train on, or both. Needs the extra `train`."""
    chosen = {key: value for key, value in locals().items() if key not in ("source", "repository")}
    with wing():
        from training.importers.command import run_import
    card = run_import(source, repository, **chosen)
    if card is not None:
        typer.echo(f"{card.name}: {card.parameters / 1e6:.1f} M parameters, digest {card.digest[:12]}")
    if checkpoint is not None:
        typer.echo(checkpoint)


def add_to(app: typer.Typer) -> None:
    """Make them commands of `app`."""
    app.command()(train)
    for command in (pretrain, encode, finetune, upcycle, adapt):
        app.command(add_help_option=False, context_settings=PASSED)(command)
    for plain in (export, scaling):
        app.command()(plain)
    app.command("import")(import_)
