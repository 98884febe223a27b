"""Gradient codes: a worker sends a combination of partial gradients, any n - s give the sum."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

from flcore import _updates
from flcore.aggregation._checks import client_mask, whole
from flcore.errors import DTypeError, InvalidInputError
from flcore.ops.combine import combine

__all__ = ["CodeCondition", "CyclicCode", "FractionalRepetition", "GradientCode", "gradient_code"]

# Largest rounding error of a value, relative, in each dtype of a message.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
WARN_ERROR = 0.01
MAX_RESIDUAL = 1e-6
MAX_ROOTS = 4
CACHED_PATTERNS = 256


@dataclass(frozen=True)
class CodeCondition:
    """How well one straggler pattern can be decoded.

    Attributes
    ----------
    largest : float
        Largest decoding coefficient, ``max |a_i|``.
    residual : float
        ``max |a^T B - 1|``: error of the coefficients themselves.
    amplification : float
        ``sum_i |a_i| sum_j |B_ij| / n``. Rounding errors of the messages, relative, come out at
        most this much larger (relative to n times the largest partial gradient); 1 is the best.
    """

    largest: float
    residual: float
    amplification: float


class GradientCode(ABC):
    r"""What all gradient codes share: n workers, n parts of the data, any s workers may be late.

    Worker i holds s + 1 parts and sends ``sum_j B_ij g_j``; the master finds ``a^T B_F = 1^T`` for
    the workers F that answered and gets ``sum_j g_j = sum_{i in F} a_i message_i``.

    Attributes
    ----------
    n, s : int
        Workers (and parts); stragglers tolerated.
    matrix : (n, n) float64
        B, read-only.
    load : float
        Share of the data that a worker processes, (s + 1) / n.

    References
    ----------
    Tandon, Lei, Dimakis, Karampatziakis, "Gradient Coding: Avoiding Stragglers in Distributed
    Learning", ICML 2017, arXiv 1612.03301.
    """

    def __init__(self, n: int, s: int, matrix: np.ndarray) -> None:
        self.n, self.s = n, s
        matrix.flags.writeable = False
        self.matrix = matrix
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()

    @property
    def load(self) -> float:
        """Share of the data that a worker processes."""
        return (self.s + 1) / self.n

    @abstractmethod
    def parts(self, worker: int) -> tuple[int, ...]:
        """Give the parts of the data that a worker holds, in the order `encode` takes them."""

    @abstractmethod
    def _solve(self, mask: np.ndarray) -> np.ndarray:
        """Coefficients of all workers, 0 outside `mask`; raises where the pattern is too poor."""

    def _order(self, workers: np.ndarray) -> np.ndarray:
        """Put `workers` into the order of summation."""
        return workers

    # ---- encode and decode ---------------------------------------------------------------------

    def encode(self, worker: int, gradients: Sequence[Any]) -> Any:
        """Give the message of a worker.

        Parameters
        ----------
        worker : int
        gradients : s + 1 updates
            Sums of the gradients over the parts that `parts` lists, in that order. Workers that
            share a part must use the same examples, dropout and augmentation for it.

        Returns
        -------
        update
            Summed in float64, in the dtypes of the gradients.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError
            See `flcore.ops.combine`; also another number of gradients.
        """
        parts = list(self.parts(worker))
        return combine(gradients, self.matrix[worker, parts].tolist(), accumulate="float64")

    def decode_coefficients(self, survivors: Any) -> np.ndarray:
        """Give the coefficients ``a`` of the messages for one pattern of survivors.

        Parameters
        ----------
        survivors : (n,) bool mask, or indices
            Workers whose message came.

        Returns
        -------
        (n,) float64, read-only
            0 for the others. The last 256 patterns are kept.

        Raises
        ------
        InvalidInputError
            Too few survivors, or (cyclic codes of high s) a pattern that float64 cannot solve.
        """
        mask = client_mask("survivors", survivors, self.n)
        key = np.packbits(mask).tobytes()
        if key not in self._cache:
            a = self._solve(mask)
            error = float(np.abs(a @ self.matrix - 1.0).max())
            if not error <= MAX_RESIDUAL:
                raise InvalidInputError(
                    "survivors: the code is too ill-conditioned for this pattern, the sum of all "
                    f"parts is off by {error:.1e}; use FractionalRepetition, or a smaller s"
                )
            a.flags.writeable = False
            self._cache[key] = a
            if len(self._cache) > CACHED_PATTERNS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def decode(self, messages: Sequence[Any], survivors: Any) -> Any:
        """Give the sum of all n partial gradients.

        Parameters
        ----------
        messages : sequence of updates, or array of shape (m, ...)
            One a survivor.
        survivors : (n,) bool mask, or (m,) indices
            Who sent them: with indices in that order, each once; with a mask in order of worker.

        Returns
        -------
        update
            Summed in float64 in an order that does not depend on the order of arrival; of the kind
            and dtypes of a message. Messages of coefficient 0 are not read.

        Raises
        ------
        InvalidInputError, DTypeError, NonFiniteError
            See `decode_coefficients` and `flcore.ops.combine`.

        Warns
        -----
        RuntimeWarning
            The dtype of the messages and the condition of the pattern allow errors above 1 %.
        """
        mask = client_mask("survivors", survivors, self.n)
        given = np.asarray(survivors)
        workers = np.flatnonzero(mask) if given.dtype == bool else given.astype(np.int64)
        if not isinstance(messages, Sized):
            raise DTypeError(f"messages: expected a list, got {type(messages).__name__}")
        if not len(messages) == workers.size == mask.sum():
            raise InvalidInputError(
                f"messages: expected one for each of {int(mask.sum())} different survivors, got "
                f"{len(messages)} for {workers.size}"
            )
        a = self.decode_coefficients(mask)
        where = {int(worker): i for i, worker in enumerate(workers)}
        order = [int(worker) for worker in self._order(np.flatnonzero(a))]
        used = [messages[where[worker]] for worker in order]
        self.warn_if_coarse(used, mask)
        return combine(used, a[order].tolist(), accumulate="float64")

    # ---- condition -----------------------------------------------------------------------------

    def condition(self, survivors: Any) -> CodeCondition:
        """Say how well a pattern can be decoded; see `CodeCondition`.

        Raises
        ------
        InvalidInputError
            See `decode_coefficients`.
        """
        a = self.decode_coefficients(survivors)
        return CodeCondition(
            largest=float(np.abs(a).max()),
            residual=float(np.abs(a @ self.matrix - 1.0).max()),
            amplification=float(np.abs(a) @ np.abs(self.matrix).sum(axis=1)) / self.n,
        )

    def warn_if_coarse(self, messages: Sequence[Any], survivors: Any) -> None:
        """Warn if rounding of such messages may cost more than 1 % for this pattern."""
        layout, _ = _updates.flatten(messages[0], "messages[0]")
        rounding = max((ROUNDING.get(spec[1], 0.0) for spec in layout.specs), default=0.0)
        amplification = self.condition(survivors).amplification
        if amplification * rounding > WARN_ERROR:
            warnings.warn(
                f"{type(self).__name__}({self.n}, {self.s}): this straggler pattern multiplies the "
                f"rounding errors of the messages by up to {amplification:.1e}; send wider floats, "
                "or use FractionalRepetition",
                RuntimeWarning,
                stacklevel=3,
            )


class CyclicCode(GradientCode):
    r"""Worker i holds parts i, i + 1, .., i + s (mod n); any n - s messages are enough.

    Parameters
    ----------
    n, s : int
        ``0 <= s < n``.
    construction : {"random", "roots"}
        "random": the rows are orthogonal to a random s x n matrix whose rows sum to zero (Tandon et
        al., Algorithm 2), any n and s. "roots": all rows are shifts of one polynomial with s of the
        n-th roots of unity as zeros, those next to -1 (Raviv et al.); nothing is drawn, n + s must
        be odd.
    seed : int
        Of the random matrix.

    Notes
    -----
    Decoding coefficients grow fast with s: for random codes ``max |a|`` reaches 10^2 for (10, 3)
    and 10^4 for (64, 15), so that float32 messages lose two to five digits and half precision is
    useless. "roots" is ten to a thousand times better up to s = 4, and for stragglers that are
    spread over the workers; s neighbours are worse from about 6, and cannot be decoded for 15.
    `condition` tells. Where s + 1 divides n, `FractionalRepetition` loses nothing.

    Examples
    --------
    >>> import numpy as np
    >>> code = CyclicCode(5, 2)
    >>> g = np.arange(10.0).reshape(5, 2)
    >>> messages = [code.encode(i, [g[j] for j in code.parts(i)]) for i in (3, 0, 4)]
    >>> code.decode(messages, survivors=[3, 0, 4]).round(6)
    array([20., 25.])

    References
    ----------
    Tandon, Lei, Dimakis, Karampatziakis, "Gradient Coding: Avoiding Stragglers in Distributed
    Learning", ICML 2017. Raviv, Tamo, Tandon, Dimakis, "Gradient Coding from Cyclic MDS Codes and
    Expander Graphs", ICML 2018, arXiv 1707.03858.
    """

    def __init__(self, n: int, s: int, *, construction: str = "random", seed: int = 0) -> None:
        n = whole("n", n, 1)
        s = whole("s", s, 0, n - 1)
        if construction not in ("random", "roots"):
            raise InvalidInputError(
                f'construction: expected "random" or "roots", got {construction!r}'
            )
        if construction == "roots" and (n + s) % 2 == 0:
            raise InvalidInputError(
                f'construction: expected n + s odd for "roots", got n = {n} and s = {s}'
            )
        self.construction = construction
        columns = (np.arange(n)[:, None] + np.arange(s + 1)) % n
        matrix = np.zeros((n, n))
        if construction == "random":
            rng = np.random.default_rng(seed)
            dual = rng.standard_normal((s, n))
            dual[:, -1] = -dual[:, :-1].sum(axis=1)
            for i, own in enumerate(columns):
                matrix[i, i] = 1.0
                matrix[i, own[1:]] = np.linalg.solve(dual[:, own[1:]], -dual[:, i])
        else:
            zeros = np.exp(2j * np.pi * (n / 2 + np.arange(s) - (s - 1) / 2) / n)
            polynomial = np.real(np.poly(zeros)) if s else np.ones(1)
            np.put_along_axis(matrix, columns, polynomial / polynomial.sum(), axis=1)
            dual = np.concatenate([np.real(v := zeros[:, None] ** np.arange(n)), np.imag(v)])
        # Rows of B in an orthonormal basis of their space: solving there, and not for B itself,
        # leaves out the s directions that B does not have.
        self._basis = np.linalg.svd(dual)[2][s:]
        self._size = np.linalg.norm(matrix, axis=1)
        self._coordinates = (matrix / self._size[:, None]) @ self._basis.T
        super().__init__(n, s, matrix)

    def parts(self, worker: int) -> tuple[int, ...]:
        """Give ``worker, worker + 1, .., worker + s``, modulo n."""
        first = whole("worker", worker, 0, self.n - 1)
        return tuple((first + j) % self.n for j in range(self.s + 1))

    def _solve(self, mask: np.ndarray) -> np.ndarray:
        if mask.sum() < self.n - self.s:
            raise InvalidInputError(
                f"survivors: expected at least {self.n - self.s}, got {int(mask.sum())}"
            )
        a = np.zeros(self.n)
        target = self._basis.sum(axis=1)
        # More survivors than needed: the solution of least norm, which is the least sensitive one.
        solution = np.linalg.lstsq(self._coordinates[mask].T, target, rcond=0.0)[0]
        a[mask] = solution / self._size[mask]
        return a


class FractionalRepetition(GradientCode):
    """Blocks of s + 1 parts, each held whole by s + 1 workers; messages are plain sums.

    All coefficients are 0 or 1, so nothing is lost in decoding. Decodes any s stragglers, and more
    where every block still has one worker.

    Parameters
    ----------
    n, s : int
        s + 1 must divide n. Worker i holds block ``i mod n / (s + 1)``.

    Examples
    --------
    >>> code = FractionalRepetition(6, 1)
    >>> [code.parts(worker) for worker in range(6)]
    [(0, 1), (2, 3), (4, 5), (0, 1), (2, 3), (4, 5)]
    >>> code.decode_coefficients([1, 2, 3, 4])
    array([0., 1., 1., 1., 0., 0.])

    References
    ----------
    Tandon, Lei, Dimakis, Karampatziakis, "Gradient Coding: Avoiding Stragglers in Distributed
    Learning", ICML 2017, section 3.
    """

    def __init__(self, n: int, s: int) -> None:
        n = whole("n", n, 1)
        s = whole("s", s, 0, n - 1)
        if n % (s + 1):
            raise InvalidInputError(f"s: expected s + 1 to divide n = {n}, got s = {s}")
        self.blocks = n // (s + 1)
        self._block = np.arange(n) % self.blocks
        super().__init__(n, s, (self._block[:, None] == np.arange(n) // (s + 1)).astype(np.float64))

    def parts(self, worker: int) -> tuple[int, ...]:
        """Give the s + 1 parts of the worker's block."""
        first = int(self._block[whole("worker", worker, 0, self.n - 1)]) * (self.s + 1)
        return tuple(range(first, first + self.s + 1))

    def _order(self, workers: np.ndarray) -> np.ndarray:
        return workers[np.argsort(self._block[workers])]  # block by block, whoever sent it

    def _solve(self, mask: np.ndarray) -> np.ndarray:
        workers = np.flatnonzero(mask)
        found, first = np.unique(self._block[workers], return_index=True)
        if found.size < self.blocks:
            lost = np.setdiff1d(np.arange(self.blocks), found)[0]
            raise InvalidInputError(f"survivors: no worker of block {lost} is among them")
        a = np.zeros(self.n)
        a[workers[first]] = 1.0
        return a


def gradient_code(n: int, s: int, *, seed: int = 0) -> GradientCode:
    """Make the code that loses least for n and s.

    `FractionalRepetition` where s + 1 divides n; else `CyclicCode`, of "roots" where they exist and
    s is at most 4, or random.

    Examples
    --------
    >>> [type(gradient_code(n, s)).__name__ for n, s in ((6, 1), (6, 3))]
    ['FractionalRepetition', 'CyclicCode']
    """
    n = whole("n", n, 1)
    if n % (whole("s", s, 0, n - 1) + 1) == 0:
        return FractionalRepetition(n, s)
    roots = (n + s) % 2 == 1 and s <= MAX_ROOTS
    return CyclicCode(n, s, construction="roots" if roots else "random", seed=seed)
