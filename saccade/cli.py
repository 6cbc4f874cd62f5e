"""The command `saccade`. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer

from saccade import __version__, clips, researching
from saccade.errands import Errand, Format, Task, collect, plan
from saccade.errors import InvalidInput, ModelError, SaccadeError, ServerError

if TYPE_CHECKING:
    from saccade.card import Card
    from saccade.client import Client
    from saccade.local import Local
    from saccade.pipeline import Answer

BAD_INPUT, FAILED = 2, 1
INTERRUPTED = 130
HERE = ("engine", "precision", "threads", "batch_size")
Command = Callable[..., None]

LOOK: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 120},
}

app = typer.Typer(name="saccade", no_args_is_help=True, **LOOK)

MODELS = "the model's"
Steps = Annotated[int | None, typer.Option(help="DDIM steps.", show_default=MODELS)]
Members = Annotated[int | None, typer.Option(help="Members, each from its own noise.", show_default=MODELS)]
Reduction = Annotated[
    Literal["aligned_median", "median", "mean"] | None,
    typer.Option(help="How members become one; aligned_median is depth's alone.", show_default=MODELS),
]
Seed = Annotated[int, typer.Option(help="Of the noise: the same seed gives the same answer.")]
Resolution = Annotated[
    int | None,
    typer.Option(help="Longer edge in pixels that the model sees; 0 keeps the picture's.", show_default=MODELS),
]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which model answers."""

    url: Annotated[
        str | None,
        typer.Option(envvar="SACCADE_URL", help="Ask this server instead of running the model in this process."),
    ] = None
    api_key: Annotated[
        str | None, typer.Option(envvar="SACCADE_API_KEY", help="Key for the server, where it wants one.")
    ] = None
    model_repository: Annotated[
        Path | None, typer.Option(help="Folder of models.", show_default="./model_repository, else the checkout's")
    ] = None
    model: Annotated[str | None, typer.Option(help="Model of the repository.", show_default="its only one")] = None

    def __post_init__(self) -> None:
        given = [
            f.name
            for f in fields(self)
            if f.name in ("model_repository", "model", *HERE) and getattr(self, f.name) != f.default
        ]
        if self.url is not None and given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise InvalidInput(
                f"the server at {self.url} has its own settings: leave out {names}, or --url", param="url"
            )


@dataclass(frozen=True, kw_only=True)
class Asking(Where):
    """How a question is asked, and how its answer is written."""

    format: Annotated[
        Format | None, typer.Option(help="File format.", show_default="by the ending of -o, else png")
    ] = None
    render: Annotated[
        Literal["data", "color", "object"] | None,
        typer.Option(
            help="What a PNG shows: a picture in colours, the completed object (amodal), or data: 16-bit depth, "
            "KITTI flow, a 0/255 mask.",
            show_default="object for amodal, else color",
        ),
    ] = None
    steps: Steps = None
    ensemble_size: Members = None
    reduction: Reduction = None
    seed: Seed = 0
    spacing: Annotated[
        Literal["leading", "linspace", "trailing"] | None,
        typer.Option(help="Spacing of the timesteps.", show_default=MODELS),
    ] = None
    processing_resolution: Resolution = None
    match_input_resolution: Annotated[bool, typer.Option(help="Bring the answer back to the picture's size.")] = True
    output_uncertainty: Annotated[
        bool, typer.Option("--output-uncertainty", help="Add the members' spread (formats npz, exr, json).")
    ] = False
    budget_ms: Annotated[
        int | None,
        typer.Option(min=1, max=600_000, help="Milliseconds to spend: the best answer by then.", show_default=False),
    ] = None
    quality: Annotated[
        Literal["fast", "balanced", "best"] | None,
        typer.Option(help="Instead of --steps and --ensemble-size.", show_default=False),
    ] = None
    target_uncertainty: Annotated[
        float | None, typer.Option(help="Add members until the answer is this sure.", show_default=False)
    ] = None
    later: Annotated[
        bool,
        typer.Option(
            "--later", help="Leave it with the server (--url) and print the id; `saccade job` fetches the answer."
        ),
    ] = False
    engine: Annotated[
        Literal["auto", "openvino", "onnxruntime"], typer.Option(help="What runs the model in this process.")
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Arithmetic of the model's linear layers in this process.")
    ] = "auto"
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the engine.", show_default="the physical cores")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows in a batch in this process.", show_default="measured")
    ] = None

    def choices(self) -> dict[str, Any]:
        names = ("steps", "ensemble_size", "reduction", "seed", "spacing", "processing_resolution")
        dialled = ("budget_ms", "quality", "target_uncertainty")
        return {
            name: getattr(self, name) for name in (*names, "match_input_resolution", "output_uncertainty", *dialled)
        }


@dataclass(frozen=True, kw_only=True)
class AskingFrames(Asking):
    """The same of something that moves."""

    frames_stride: Annotated[
        int | None, typer.Option(min=1, help="Of a video: every n-th frame.", show_default="each")
    ] = None
    frames_limit: Annotated[
        int | None, typer.Option(min=1, help="Of a video: the first n frames.", show_default="all")
    ] = None

    def check_pictures(self) -> None:
        """Raise InvalidInput for what only a clip can be asked with."""
        if self.frames_stride is not None or self.frames_limit is not None:
            raise InvalidInput("--frames-stride and --frames-limit are about a video", param="frames_stride")

    def about(self) -> dict[str, Any]:
        """What a clip is asked with."""
        return {**self.choices(), "frames_stride": self.frames_stride, "frames_limit": self.frames_limit}


@dataclass(frozen=True, kw_only=True)
class AskingDepth(AskingFrames):
    steady: Annotated[
        bool | None,
        typer.Option("--steady/--no-steady", help="One scale for all frames.", show_default="for videos"),
    ] = None
    known_depths: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON or CSV of x, y, metres: the answer is in metres.",
            show_default=False,
        ),
    ] = None

    def choices(self) -> dict[str, Any]:
        known = {} if self.known_depths is None else {"known_depths": clips.known_depths(self.known_depths)}
        return super().choices() | known

    def about(self) -> dict[str, Any]:
        return super().about() | {"steady": self.steady}


Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="File; of several pictures the folder.",
        show_default="in this folder: NAME_TASK.png, or FOLDER_TASK/",
    ),
]


def taking(kind: type[Any]) -> Callable[[Command], Command]:
    """Give a command the fields of the dataclass `kind` as options; it receives them as one, its last argument."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        hints = get_type_hints(kind, include_extras=True)
        own = list(signature.parameters.values())[:-1]
        more = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(kind)
        ]

        def run(**given: Any) -> None:
            options = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
            command(*given.values(), options)

        run.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"saccade {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Depth, motion and whole objects from pictures: in this process, or by a server with --url."""


Pictures = Annotated[list[Path], typer.Argument(metavar="PICTURE", help="Pictures, or folders of them.")]


@app.command()
@taking(AskingDepth)
def depth(pictures: Pictures, out: Out = None, asking: AskingDepth = AskingDepth()) -> None:
    """How far everything is.

    \b
    saccade depth photo.jpg -o depth.png    a picture: near is red, far is violet
    saccade depth photo.jpg -o depth.npy    [H, W] float32, 0 nearest, 1 farthest
    saccade depth photos/ -o depths/        one for each picture of the folder
    saccade depth clip.mp4 -o depth.mp4     a video, its frames in one scale
    saccade depth photo.jpg -o depth.npy --known-depths points.csv    in metres
    """
    if clips.is_clip(pictures, asking.steady):
        return _answer_clip("depth", pictures, out, asking)
    asking.check_pictures()
    _answer("depth", plan("depth", pictures, out=out, format=asking.format), asking)


@app.command()
@taking(AskingFrames)
def flow(
    frames: Annotated[list[Path], typer.Argument(metavar="FRAME", help="Two frames or more, or a folder of them.")],
    out: Out = None,
    asking: AskingFrames = AskingFrames(),
) -> None:
    """Where everything moved from each frame to the next.

    \b
    saccade flow a.png b.png -o motion.png  a picture: hue is the direction, strength the speed
    saccade flow a.png b.png -o motion.flo  Middlebury's file; .npy is [H, W, 2], pixels right and down
    saccade flow frames/ -o motion/         every two neighbours, in the order of their names
    saccade flow clip.mp4 -o motion.mp4     every two frames of a video
    """
    if clips.is_clip(frames, None):
        return _answer_clip("flow", frames, out, asking)
    asking.check_pictures()
    _answer("flow", plan("flow", frames, out=out, format=asking.format), asking)


@app.command()
@taking(Asking)
def amodal(
    pictures: Pictures,
    mask: Annotated[
        Path, typer.Option(help="White where the object is seen; or a folder of masks named as the pictures.")
    ],
    out: Out = None,
    asking: Asking = Asking(),
) -> None:
    """The whole of a half-hidden object.

    \b
    saccade amodal photo.jpg --mask seen.png -o object.png    the completed object, cut out
    saccade amodal photo.jpg --mask seen.png -o whole.npy     its mask, [H, W] bool
    saccade amodal photos/ --mask masks/ -o objects/          masks are named as the pictures
    """
    _answer("amodal", plan("amodal", pictures, mask=mask, out=out, format=asking.format), asking)


@app.command()
@taking(Where)
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole cards.")] = False,
    where: Where = Where(),
) -> None:
    """What can be run: names, tasks, defaults, licence."""
    cards = _cards(where)
    if as_json:
        typer.echo(json.dumps([card.model_dump(mode="json") for card in cards], indent=2))
    else:
        _print_cards(cards)


@app.command()
@taking(Where)
def jobs(where: Where = Where()) -> None:
    """What was left with a server by --later, newest first."""
    with _server(where) as client:
        for job in client.jobs(100):
            typer.echo(f"{job.id}  {job.status:<9}  {job.task:<6}  {job.created:%Y-%m-%d %H:%M:%S}")


@app.command()
@taking(Where)
def job(
    identity: Annotated[str, typer.Argument(metavar="ID", help="What --later has printed.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File.", show_default="ID.png, in this folder")
    ] = None,
    format: Annotated[Format | None, typer.Option(help="File format.", show_default="by the ending of -o")] = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Withdraw it instead, or forget one that has ended.")
    ] = False,
    where: Where = Where(),
) -> None:
    """Wait for the answer to what was left with a server, and write it."""
    from saccade.later import OtherAnswer
    from saccade.render import MEDIA_TYPES

    with _server(where) as client:
        if cancel:
            return client.cancel(identity)
        errand = collect(out or Path(f"{identity}.png"), format)
        try:
            data = _written(client.result(identity), errand, Asking())
        except OtherAnswer as other:
            if other.media_type != MEDIA_TYPES[errand.format]:
                raise
            data = other.data
    errand.out.write_bytes(data)
    typer.echo(errand.out)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def serve(context: typer.Context) -> None:
    """Answer over HTTP until stopped."""
    from server.settings import PREFIX, Settings

    def start(**flags: Any) -> None:
        settings = Settings.load(**flags)
        from server import app

        app.serve(settings)

    options = [_option("config", Path, f"A TOML file of settings. [{PREFIX}CONFIG]")]
    for name, setting in Settings.model_fields.items():
        told = f"{setting.description} [{PREFIX}{name.upper()}]"
        options.append(_option(name, setting.annotation, told, setting.default))
    start.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    start.__annotations__ = {option.name: option.annotation for option in options}
    start.__doc__ = "Answer over HTTP until stopped. Flags win over [the environment], that over the file."
    serving = typer.Typer(**LOOK)
    serving.command()(start)
    serving(context.args, prog_name="saccade serve")


def _option(name: str, kind: Any, told: str, default: object = None) -> inspect.Parameter:
    """A flag that is None unless it is given; `default` is only shown."""
    shown = False if default is None else str(default)
    annotation = Annotated[kind | None, typer.Option(help=told, show_default=shown)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command()
@taking(Where)
def evaluate(
    data: Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures with truth: depth/, flow/, amodal/.")],
    task: Annotated[Task | None, typer.Option(help="Only this task.", show_default="all")] = None,
    steps: Steps = None,
    ensemble_size: Members = None,
    reduction: Reduction = None,
    seed: Seed = 0,
    processing_resolution: Resolution = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report and its pictures.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also measure quality against steps and members.")] = False,
    backend: Annotated[
        Literal["graphs", "torch"],
        typer.Option(help="Run the repository's graphs, or torch modules: a run's (--run), or the default model's."),
    ] = "graphs",
    run: Annotated[
        Path | None, typer.Option(help="With --backend torch: the folder of a run, as it is.", show_default=False)
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(help="With --run of the default model: JSON of its tasks.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="With --backend torch: cpu, cuda, cuda:1.")] = "cpu",
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="With --backend torch: arithmetic of its linear layers.")
    ] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="With --backend torch: members denoised together.")] = 1,
    where: Where = Where(),
) -> None:
    """How well the model answers, beside simple and classical methods. Needs the extra `train`."""
    if not data.is_dir():
        raise InvalidInput(f"no such folder: {data}", param="data")
    if backend == "graphs":
        _only_with_torch(
            run=run, facts=facts, device=device != "cpu", precision=precision != "fp32", batch_size=batch_size > 1
        )
    with researching.wing():
        from training import evaluate as evaluation
    evaluation.main(
        data,
        url=where.url,
        repository=where.model_repository,
        model=where.model,
        tasks=(task,) if task else get_args(Task),
        steps=steps,
        ensemble_size=ensemble_size,
        reduction=reduction,
        seed=seed,
        processing_resolution=processing_resolution,
        out=out,
        run_sweep=sweep,
        torch=None if backend == "graphs" else evaluation.OnTorch(run, facts, device, precision, batch_size),
    )


def _only_with_torch(**given: object) -> None:
    """Raises InvalidInput for an option that the graphs would ignore."""
    for name, value in given.items():
        if value:
            raise InvalidInput(f"--{name.replace('_', '-')} is of the torch backend: add --backend torch", param=name)


researching.add_to(app)

keys = typer.Typer(name="keys", help="API keys of a server.", no_args_is_help=True, **LOOK)
app.add_typer(keys)


@keys.callback()
def _keys() -> None:
    """API keys of a server."""


@keys.command("new")
def new_key(
    name: Annotated[str, typer.Option(help="Who will use it; shown in the server's log.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it may do: depth, flow, amodal, jobs, models, v2, metrics.", show_default="everything"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Most requests a minute.", show_default="no limit")] = None,
    burst: Annotated[int, typer.Option(min=1, help="Requests at once before the rate holds.")] = 10,
    weight: Annotated[
        float, typer.Option(min=0.01, max=100, help="Its share of a busy server, against that of other keys.")
    ] = 1.0,
    file: Annotated[Path | None, typer.Option(help="Keys file to add it to.", show_default="print its lines")] = None,
) -> None:
    """Make a key. It is shown this once: the server's file has only its digest."""
    from server import keys as ring

    key = ring.new()
    lines = ring.entry(name, key, scope, rate, burst, weight)
    if file is not None:
        ring.add(file, lines)
    else:
        typer.echo(f"# add this to the server's keys_file\n{lines}", err=True)
    typer.echo(key)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, 2 for what the caller can mend, 1 for the rest, 130 after Ctrl-C."""
    try:
        app(arguments, prog_name="saccade")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (SaccadeError, OSError) as error:
        _complain(error)
        sys.exit(_exit_code(error))


def _complain(error: BaseException, about: str = "") -> None:
    sys.stderr.write(f"saccade: {about}{_said(error)}\n")  # typer.echo would write across the progress bar


def _said(error: BaseException) -> str:
    said = [str(error) or type(error).__name__, *getattr(error, "__notes__", ())]
    if isinstance(error, ServerError) and error.status == 401:
        said.append("(Here: --api-key, or SACCADE_API_KEY.)")
    return " ".join(" ".join(said).split())


def _exit_code(error: BaseException) -> int:
    if isinstance(error, ServerError):
        return BAD_INPUT if 400 <= error.status < 500 and error.status not in (408, 429) else FAILED
    return BAD_INPUT if isinstance(error, InvalidInput) else FAILED


@contextmanager
def _model(asking: Asking) -> Iterator[Client | Local]:
    if asking.url is None:
        from saccade.local import Local

        with Local(asking.model_repository, asking.model, **{name: getattr(asking, name) for name in HERE}) as local:
            yield local
        return
    from saccade.client import Client

    with Client(asking.url, api_key=asking.api_key) as client:
        yield client


def _answer(task: Task, errands: Sequence[Errand], asking: Asking) -> None:
    if asking.later:
        return _leave(task, errands, asking)
    _check(task, errands, asking)
    with _model(asking) as model:
        if len(errands) > 1:
            return _run_all(task, errands, asking, model)
        _run(task, errands[0], asking, model)
    typer.echo(errands[0].out)


def _answer_clip(task: Task, inputs: Sequence[Path], out: Path | None, asking: AskingFrames) -> None:
    if asking.later:
        told = "--later is for pictures one by one: leave a video, or pictures with one scale, with curl and the header"
        raise InvalidInput(f"{told} 'Prefer: respond-async' (docs/jobs.md)", param="later")
    from saccade import reel

    where, format = clips.target(task, inputs, out, asking.format)
    reel.check(task, format, asking.render or "data", asking.output_uncertainty)
    with _model(asking) as model:
        seen = clips.ask(task, inputs, model, asking.about())
    _tell_cut(seen, str(inputs[0]))
    clips.write(seen, where, format, asking.render)
    typer.echo(where)


def _leave(task: Task, errands: Sequence[Errand], asking: Asking) -> None:
    if "known_depths" in asking.choices():
        raise InvalidInput("--later and --known-depths do not go together", param="later")
    with _server(asking) as client:
        for errand in errands:
            given: dict[str, Any] = {**errand.pictures, **asking.choices()}
            typer.echo(client.submit(task, **given).id)


@contextmanager
def _server(where: Where) -> Iterator[Client]:
    if where.url is None:
        raise InvalidInput("jobs are kept by a server: name it with --url or SACCADE_URL", param="url")
    from saccade.client import Client

    with Client(where.url, api_key=where.api_key) as client:
        yield client


def _run_all(task: Task, errands: Sequence[Errand], asking: Asking, model: Client | Local) -> None:
    """A picture that cannot be answered is reported, and the rest goes on."""
    failed = 0
    with _progress(errands, task) as walk:
        for errand in walk:
            try:
                _run(task, errand, asking, model)
            except (InvalidInput, ModelError, ServerError) as error:
                failed += 1
                _complain(error, f"{errand.pictures['image']}: ")
    typer.echo(f"{len(errands) - failed} of {len(errands)} written to {errands[0].out.parent}")
    if failed:
        raise typer.Exit(FAILED)


def _check(task: Task, errands: Sequence[Errand], asking: Asking) -> None:
    from saccade import render

    style = asking.render or "data"
    render.check(task, errands[0].format, style, asking.output_uncertainty)


def _run(task: Task, errand: Errand, asking: Asking, model: Client | Local) -> None:
    ask = {"depth": model.depth, "flow": model.flow, "amodal": model.amodal}[task]
    answer: Answer = ask(**errand.pictures, **asking.choices())  # type: ignore[operator]
    _tell_cut([answer], str(errand.pictures["image"]))
    data = _written(answer, errand, asking)
    errand.out.parent.mkdir(parents=True, exist_ok=True)
    errand.out.write_bytes(data)


def _tell_cut(answers: Iterable[Answer], name: str) -> None:
    """On stderr, what the time has cut off."""
    cut = [answer.plan for answer in answers if answer.plan is not None and not answer.plan.complete]
    if cut:
        least = min(cut, key=lambda plan: (plan.members, plan.steps_taken))
        members = f"{least.members} of {least.ensemble_size} members"
        told = f"the time was up: {members}, {least.steps_taken} of {least.steps} steps"
        typer.echo(f"saccade: {name}: {told}", err=True)


def _written(answer: Answer, errand: Errand, asking: Asking) -> bytes:
    from saccade import render
    from saccade.calls import MAX_PIXELS
    from saccade.formats import read_picture

    style = asking.render or _natural(answer, errand)
    picture = None
    if answer.task == "amodal" and style == "color" and errand.pictures:
        picture = read_picture(errand.pictures["image"].read_bytes(), max_pixels=MAX_PIXELS)
    return render.encode(answer, errand.format, style, "npy", picture=picture).data


def _natural(answer: Answer, errand: Errand) -> Literal["data", "color", "object"]:
    """A PNG is to look at; every other format is data."""
    if errand.format != "png":
        return "data"
    return "object" if answer.completed is not None else "color"


@contextmanager
def _progress(errands: Sequence[Errand], task: Task) -> Iterator[Iterable[Errand]]:
    """The errands, with a bar where somebody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar.track(errands, description=task)


def _cards(where: Where) -> list[Card]:
    if where.url is not None:
        from saccade.client import Client

        with Client(where.url, api_key=where.api_key) as client:
            return client.models()
    from saccade.repository import Repository, find_repository

    repository = Repository(find_repository(where.model_repository))
    return [repository.card(name) for name in ([where.model] if where.model else repository.denoisers())]


def _print_cards(cards: Sequence[Card]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "task", "steps", "members", "reduction", "parameters", "licence", "digest", box=None)
    for card in cards:
        facts = (f"{card.parameters / 1e6:.1f} M", card.licence, card.digest[:12])
        if not card.tasks:  # a generator of classes, for the raw protocol alone
            table.add_row(card.name, "-", "-", "-", f"{card.classes} classes, /v2 only", *facts)
        for task, known in card.tasks.items():
            defaults = known.defaults
            table.add_row(card.name, task, str(defaults.steps), str(defaults.ensemble_size), defaults.reduction, *facts)
    console = Console()
    console.width = console.measure(table, options=console.options.update(width=1000)).maximum  # never cut short
    console.print(table)
