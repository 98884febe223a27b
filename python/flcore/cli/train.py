"""`flcore train`: federated training on this machine, from options to report."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from flcore._extras import require
from flcore.algorithms import FedAvg, available, create
from flcore.cli.train_display import Display, show_error, show_result, show_stopped
from flcore.compression import CODECS, FEEDBACKS, from_text
from flcore.errors import FlcoreError, InvalidInputError
from flcore.simulation import MODELS, CheckpointError, Settings, run
from flcore.simulation.report import write_report
from flcore.simulation.runfolder import RunFolder

__all__ = ["train"]

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C stopped: 128 + SIGINT, as shells have it."""

SETTING = Settings()
LEARNING: dict[str, Any] = {field.name: field.default for field in fields(FedAvg)}

_what = partial(typer.Option, rich_help_panel="What is trained")
_clients = partial(typer.Option, rich_help_panel="Clients")
_local = partial(typer.Option, rich_help_panel="Local training")
_server = partial(typer.Option, rich_help_panel="Server")
_uplink = partial(typer.Option, rich_help_panel="Uplink compression")
_base = partial(typer.Option, rich_help_panel="Frozen base")
_run = partial(typer.Option, rich_help_panel="The run")


def train(
    ctx: typer.Context,
    algorithm: Annotated[str, _what(help=f"One of: {', '.join(available())}.")] = "fedavg",
    model: Annotated[
        str, _what(help="; ".join(f"{name}: {what}" for name, what in MODELS.items()) + ".")
    ] = "mlp",
    dataset: Annotated[
        str,
        _what(
            help="digits (comes with scikit-learn); the path of an .npz file with x_train, "
            "y_train, x_test and y_test; cifar10; or a Hugging Face id such as uoft-cs/cifar10 "
            "(needs the package datasets)."
        ),
    ] = "digits",
    clients: Annotated[
        int, _clients(help="Number of clients the training data is dealt to.")
    ] = SETTING.clients,
    participation: Annotated[
        str, _clients(help="Clients in each round: a count (5), or a share of all (0.1, 10%).")
    ] = str(SETTING.participation),
    alpha: Annotated[
        str,
        _clients(
            help="How alike clients are: Dirichlet concentration of their classes (0.05: one or "
            "two classes each; 100: nearly alike), or iid."
        ),
    ] = str(SETTING.alpha),
    local_epochs: Annotated[
        int, _local(help="Passes over its own data that a client makes in a round.")
    ] = LEARNING["local_epochs"],
    batch_size: Annotated[int, _local(help="Examples in a mini-batch.")] = LEARNING["batch_size"],
    lr: Annotated[float, _local(help="Learning rate in the first round.")] = LEARNING["local_lr"],
    lr_decay: Annotated[
        float, _local(help="Factor on the learning rate after every round.")
    ] = LEARNING["lr_decay"],
    weight_decay: Annotated[
        float, _local(help="Decay added to each gradient, after clipping.")
    ] = LEARNING["weight_decay"],
    clip: Annotated[float, _local(help="Largest norm of a gradient; 0: no limit.")] = LEARNING[
        "clip"
    ],
    optimizer: Annotated[
        Literal["sgd", "perpgrad"],
        _local(
            help="sgd: steps along the gradient; perpgrad: along the gradient without its part "
            "along the parameters, tensor by tensor, which keeps logits from growing."
        ),
    ] = SETTING.optimizer,  # type: ignore[assignment]
    loss: Annotated[
        Literal["softmax", "stablemax"],
        _local(
            help="Cross-entropy of softmax or of StableMax, whose gradients do not vanish when "
            "logits grow (it wants a larger --lr)."
        ),
    ] = SETTING.loss,  # type: ignore[assignment]
    server_lr: Annotated[
        float,
        _server(help="Step along the aggregated update; 1 works with every error control."),
    ] = LEARNING["server_lr"],
    weighting: Annotated[
        Literal["examples", "uniform"],
        _server(help="Whether clients count by their number of examples, or all alike."),
    ] = LEARNING["weighting"],
    aggregation: Annotated[
        Literal["mean"], _server(help="Rule that makes one update of many.")
    ] = "mean",
    accumulate: Annotated[
        Literal["float32", "float64", "reproducible"],
        _server(help="Arithmetic of the sum; reproducible: the same bits in any order."),
    ] = SETTING.accumulate,  # type: ignore[assignment]
    compressor: Annotated[
        str,
        _uplink(
            metavar="NAME[:KEY=VALUE,...]",
            help=f"One of {', '.join(sorted(CODECS))}, with settings of the class, such as "
            "topk:values=bfloat16 or absmax:bits=4; none: all values, as float32.",
        ),
    ] = "topk",
    ratio: Annotated[
        float,
        _uplink(help="Share of the values that is sent, 0 to 1, by codecs that send some of them."),
    ] = 0.1,
    error_control: Annotated[
        str,
        _uplink(
            metavar="NAME[:KEY=VALUE,...]",
            help="What becomes of the rest. econtrol: it is kept, and messages are changes of an "
            "estimate that the server holds too; ef14: it is added to the client's next update; "
            "ef21: messages are changes of an estimate, nothing else is kept "
            "(ef21:momentum=0.1); dgc: momentum and rest of each value wait until it is sent; "
            "none: it is lost.",
        ),
    ] = "econtrol",
    eta: Annotated[
        str,
        _uplink(
            help="econtrol: strength of the kept error. auto: the share of values sent; about "
            "four times that diverges."
        ),
    ] = "auto",
    control_step: Annotated[
        Literal["saga", "paper"],
        _uplink(
            help="econtrol, ef21: direction of the server. saga: the mean of what all clients said "
            "before, and the mean news of those present; paper: the mean of what all said last, "
            "which is later when few take part. The same when all do."
        ),
    ] = SETTING.control_step,  # type: ignore[assignment]
    base_bits: Annotated[
        int | None,
        _base(
            help="Freeze the model with its linear layers in 8, 4, 3 or 2 bits and train adapters "
            "only. The server first trains it on a fifth of the training data, which no client "
            "gets.",
            show_default="train all parameters",
        ),
    ] = SETTING.base_bits,
    lora: Annotated[
        int, _base(help="Rank of the adapters, which alone are trained and sent.")
    ] = SETTING.lora,
    rounds: Annotated[
        int, _run(help="Communication rounds, those before a --resume included.")
    ] = SETTING.rounds,
    seed: Annotated[int, _run(help="Source of all random numbers of the run.")] = SETTING.seed,
    output: Annotated[
        Path | None,
        _run(
            "--output",
            "-o",
            help="Folder for report.html, metrics.jsonl, model.safetensors, config.json and the "
            "checkpoint.",
            show_default="the next free runs/ALGORITHM-DATASET-NUMBER",
        ),
    ] = None,
    resume: Annotated[
        bool,
        _run(
            "--resume",
            help="Continue the run in --output, bit for bit, with its own settings; --rounds may "
            "be raised.",
        ),
    ] = False,
    checkpoint_every: Annotated[
        int, _run(help="Rounds between checkpoints.")
    ] = SETTING.checkpoint_every,
    threads: Annotated[
        int, _run(help="Threads of training and aggregation; 1 is fastest for the MLP.")
    ] = SETTING.threads,
) -> None:
    """Train one model on the data of many clients, on this machine.

    Every update crosses a real uplink: packed into bytes by the client, checked and summed by the
    server. Without options: digits, one or two of the ten to each of 50 clients, five clients a
    round, a tenth of the values sent; some seconds of work, above 95 % test accuracy.

    Ctrl-C completes the round and leaves a run that --resume continues.
    """
    options = dict(ctx.params)
    given = {
        name: value
        for name, value in options.items()
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    try:
        for module in ("torch", "safetensors", "matplotlib"):
            require(module, extra="train")  # say so before the training, not after it
        if resume:
            options |= _stored_options(output) | given
        elif compressor == "none" and "error_control" not in given:
            options["error_control"] = "none"
        _train(options)
    except FlcoreError as error:
        show_error(error)
        raise typer.Exit(1) from None


def _train(options: dict[str, Any]) -> None:
    algorithm = create(
        options["algorithm"],
        local_lr=options["lr"],
        lr_decay=options["lr_decay"],
        local_epochs=options["local_epochs"],
        batch_size=options["batch_size"],
        weight_decay=options["weight_decay"],
        clip=options["clip"] or None,
        server_lr=options["server_lr"],
        weighting=options["weighting"],
    )
    settings = _settings(options)
    folder = options["output"] or _next_folder(algorithm.name, options["dataset"])
    display = Display(settings)
    with _stop_on_interrupt(display):
        try:
            with display:
                history = run(
                    algorithm,
                    options["model"],
                    options["dataset"],
                    settings,
                    output=folder,
                    resume=options["resume"],
                    observer=display,
                )
        except KeyboardInterrupt:
            show_stopped(folder, None)
            raise typer.Exit(INTERRUPTED) from None
    if not history.complete:
        show_stopped(folder, history)
        raise typer.Exit(INTERRUPTED)
    report = folder / "report.html"
    write_report(history, report)
    show_result(history, folder)


def _settings(options: dict[str, Any]) -> Settings:
    return Settings(
        rounds=options["rounds"],
        clients=options["clients"],
        participation=_participation(options["participation"]),
        alpha=None if options["alpha"] == "iid" else _number("alpha", options["alpha"], "iid"),
        seed=options["seed"],
        codec=_codec(options["compressor"], options["ratio"]),
        feedback=_feedback(options["error_control"], options["eta"]),
        control_step=options["control_step"],
        loss=options["loss"],
        optimizer=options["optimizer"],
        accumulate=options["accumulate"],
        base_bits=options["base_bits"],
        lora=options["lora"],
        threads=options["threads"],
        checkpoint_every=options["checkpoint_every"],
    )


def _codec(text: str, ratio: float) -> Any:
    if text == "none":
        return None
    counted = "k=" in text or "tau=" in text  # instead of a share
    return _described("compressor", CODECS, text, ratio=None if counted else ratio)


def _feedback(text: str, eta: str) -> Any:
    if text == "none":
        return None
    number = "auto" if eta == "auto" else _number("eta", eta, "auto")
    return _described("error-control", FEEDBACKS, text, eta=number)


def _described(option: str, classes: dict[str, Any], text: str, **more: Any) -> Any:
    try:
        return from_text(classes, text, **more)
    except InvalidInputError as error:
        if text.partition(":")[0] in classes:
            raise
        raise InvalidInputError(f"{option}: {error}, or none") from None


def _participation(text: str) -> int | float:
    """Read ``5`` as a count, ``0.1`` and ``10%`` as a share."""
    if text.lstrip("+-").isdecimal():
        return int(text)
    if text.endswith("%"):
        return _number("participation", text[:-1], "a count") / 100
    return _number("participation", text, "a percentage")


def _number(name: str, text: str, alternative: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInputError(f"{name}: expected a number or {alternative}, got {text!r}")
    return value


def _stored_options(folder: Path | None) -> dict[str, Any]:
    """Give the options that the run in a folder was started with."""
    if folder is None:
        raise CheckpointError("--resume: name the folder of the run with --output")
    config = RunFolder.read_config(folder)
    if config is None:
        raise CheckpointError(f"--resume: there is no run in {folder}")
    learning, settings = config["algorithm"], config["settings"]
    codec, feedback = settings["codec"], settings["feedback"]
    same = ("lr_decay", "local_epochs", "batch_size", "weight_decay", "server_lr", "weighting")
    kept = ("rounds", "clients", "seed", "control_step", "accumulate", "threads")
    steps = ("loss", "optimizer", "base_bits", "lora")
    return {
        **{name: learning[name] for name in same},
        **{name: settings[name] for name in (*kept, *steps)},
        "algorithm": learning["name"],
        "lr": learning["local_lr"],
        "clip": learning["clip"] or 0.0,
        "model": config["model"]["name"],
        "dataset": config["dataset"]["name"],
        "participation": str(settings["participation"]),
        "alpha": "iid" if settings["alpha"] is None else str(settings["alpha"]),
        "checkpoint_every": settings["checkpoint_every"],
        "compressor": _as_text(CODECS, codec, "codec"),
        "error_control": _as_text(FEEDBACKS, feedback, "feedback"),
        **({"ratio": codec["ratio"]} if codec and codec.get("ratio") else {}),
        **({"eta": str(feedback["eta"])} if feedback and "eta" in feedback else {}),
    }


def _as_text(classes: dict[str, Any], stored: dict[str, Any] | None, family: str) -> str:
    """Give what a user would write for stored settings."""
    if stored is None:
        return "none"
    return classes[stored[family]].from_dict(stored).to_text(leave_out=("ratio", "eta"))


def _next_folder(algorithm: str, dataset: str) -> Path:
    """Give the first ``runs/ALGORITHM-DATASET-NUMBER`` that does not exist."""
    stem = f"runs/{algorithm}-{Path(dataset).stem}"
    number = 1
    while (folder := Path(f"{stem}-{number}")).exists():
        number += 1
    return folder


@contextmanager
def _stop_on_interrupt(display: Display) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to stop after the round; the second raises."""

    def handle(signum: int, frame: FrameType | None) -> None:
        if display.stopping:
            raise KeyboardInterrupt
        display.stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
