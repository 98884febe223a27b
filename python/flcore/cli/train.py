"""`flcore train`: federated training on this machine, from options to report."""

from __future__ import annotations

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
from flcore.algorithms import Algorithm, FedAvg, available, create
from flcore.cli.train_display import Display, show_error, show_result, show_stopped
from flcore.cli.train_options import (
    learning_options,
    next_folder,
    settings_of,
    stored_options,
)
from flcore.compression import CODECS
from flcore.errors import FlcoreError
from flcore.simulation import MODELS, Settings, run
from flcore.simulation.attacks import ATTACKS
from flcore.simulation.dealing import PARTITIONS
from flcore.simulation.report import write_report

__all__ = ["train"]

INTERRUPTED = 130
"""Exit status of a run that Ctrl-C stopped: 128 + SIGINT, as shells have it."""

SETTING = Settings()
LEARNING: dict[str, Any] = {field.name: field.default for field in fields(FedAvg)}
"""Defaults of what all algorithms have; some, like fedbn, have others of their own."""

_what = partial(typer.Option, rich_help_panel="What is trained")
_clients = partial(typer.Option, rich_help_panel="Clients")
_faults = partial(typer.Option, rich_help_panel="Faults and attacks")
_local = partial(typer.Option, rich_help_panel="Local training (defaults of fedavg)")
_server = partial(typer.Option, rich_help_panel="Server")
_uplink = partial(typer.Option, rich_help_panel="Uplink compression")
_base = partial(typer.Option, rich_help_panel="Frozen base")
_run = partial(typer.Option, rich_help_panel="The run")


def train(
    ctx: typer.Context,
    algorithm: Annotated[str, _what(help=f"One of: {', '.join(available())}.")] = "fedavg",
    option: Annotated[
        list[str] | None,
        _what(
            "--option",
            metavar="KEY=VALUE",
            help="Option of the algorithm, such as rho=0.1; several times if wanted. 'flcore "
            "algorithms NAME' lists them.",
        ),
    ] = None,
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
    partition: Annotated[
        str | None,
        _clients(
            help="How the training data is dealt, in the place of --alpha: "
            + "; ".join(f"{name} ({what})" for name, what in PARTITIONS.items())
            + ".",
            show_default="dirichlet:ALPHA",
        ),
    ] = None,
    alpha: Annotated[
        str,
        _clients(
            help="How alike clients are: Dirichlet concentration of their classes (0.05: one or "
            "two classes each; 100: nearly alike), or iid."
        ),
    ] = str(SETTING.alpha),
    dropout: Annotated[
        float, _faults(help="Probability that a client that was drawn does not answer.")
    ] = SETTING.dropout,
    stragglers: Annotated[
        float, _faults(help="Probability that a client does only a part of its local steps.")
    ] = SETTING.stragglers,
    label_noise: Annotated[
        float, _faults(help="Share of the training labels that are wrong.")
    ] = SETTING.label_noise,
    attack: Annotated[
        str | None,
        _faults(
            metavar="NAME[:KEY=VALUE,...]",
            help=f"What --attackers send: {', '.join(ATTACKS)}.",
            show_default="none",
        ),
    ] = None,
    attackers: Annotated[
        str, _faults(help="Clients that lie: a count (5), or a share of all (0.2, 20%).")
    ] = "0",
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
        str,
        _server(
            metavar="RULE[:KEY=VALUE,...]",
            help="Rule that makes one update of many: mean, weighted; or a robust one such as "
            "trimmed-mean:f=1, geometric-median or 'nnm:f=1>>trimmed-mean:f=1'.",
        ),
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
            show_default="topk with fedavg, none with other algorithms",
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
    execution: Annotated[
        Literal["auto", "batched", "sequential"],
        _run(help="Train the clients of a round together as one batched computation, or in turn."),
    ] = SETTING.execution,  # type: ignore[assignment]
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
            stored = stored_options(output)
            learning = stored.pop("learning") | learning_options(given)
            options |= stored | given
        else:
            learning = learning_options(given)
            if algorithm != "fedavg" and "compressor" not in given:
                options["compressor"] = compressor = "none"
            if compressor == "none" and "error_control" not in given:
                options["error_control"] = "none"
        _train(options, create(options["algorithm"], **learning))
    except FlcoreError as error:
        show_error(error)
        raise typer.Exit(1) from None


def _train(options: dict[str, Any], algorithm: Algorithm) -> None:
    settings = settings_of(options)
    folder = options["output"] or next_folder(algorithm.name, options["dataset"])
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
