"""FedBN: batch normalisation stays with the client, everything else is averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flcore.algorithms.base import check_choice, check_whole
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Layout
from flcore.algorithms.state import Client, DataView

__all__ = ["FedBN"]


@dataclass(frozen=True, kw_only=True)
class FedBN(FedAvg):
    r"""Local batch normalisation (Li et al., ICLR 2021, arXiv 2102.07623).

    The tensors of a model fall into those of its batch normalisations, L, and the others, G.  All
    clients start from one model; then

    .. math::
        x &= (w_G, l_i), \qquad \text{local SGD on all of } x \\
        l_i &= x_L, \qquad w_G \leftarrow w_G + \frac{1}{|S|} \sum_{i \in S} (x_{i,G} - w_G)

    so that L is never sent.  What is tested is each client's own model, :math:`(w_G, l_i)`, on its
    own domain.

    Parameters
    ----------
    keep : {"all", "statistics", "nothing"}
        What a client keeps of L: weights, biases and running statistics; the statistics alone
        (SiloBN: Andreux et al., arXiv 2008.07424); or nothing, which is FedAvg with the statistics
        averaged too.

    Notes
    -----
    L is told by the type of the modules, so that it does not matter what they are called; a model
    without any makes this FedAvg.  A client that has not taken part yet has the L of the initial
    model.  Statistics of a batch need two examples: a last batch of one joins the one before.
    """

    name: ClassVar[str] = "fedbn"
    evaluation: ClassVar[str] = "personal"
    statistics: ClassVar[bool] = True

    local_lr: float = 0.01
    lr_decay: float = 1.0
    local_epochs: int = 1
    batch_size: int = 32
    weight_decay: float = 0.0
    clip: float | None = None
    weighting: str = "uniform"
    keep: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("keep", self.keep, ("all", "statistics", "nothing"))
        check_whole("batch_size", self.batch_size, least=2)

    def layout(self, layout: Layout) -> Layout:
        """Leave to the client what it keeps."""

        def group(name: str) -> str:
            kept = self.keep == "all" or layout.slices[name].start >= layout.trained
            normalises = layout.kinds.get(name) == "batch_norm"
            return "personal" if normalises and kept and self.keep != "nothing" else "shared"

        return layout.grouped(group)

    def data_view(self, client: Client) -> DataView:
        """Pass over the examples in random order, never with one alone."""
        view = super().data_view(client)
        sizes: list[int] = []
        for size in view.sizes:
            if size == 1 and len(client.indices) > 1:
                sizes[-1] += 1
            else:
                sizes.append(size)
        return DataView(view.order, sizes, view.x, view.y)
