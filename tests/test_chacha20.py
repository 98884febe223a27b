"""Mask streams are ChaCha20: vectors of RFC 8439, pieces of a stream, its end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flcore.errors import InvalidInputError
from flcore.ops import mask_add
from flcore.ops.mask import Mask
from flcore.reference.mask import chacha20_block

VARIANTS = ("cpu", "reference")
COUNTING = bytes(range(32))
MASKS = [Mask(COUNTING), Mask(bytes(32), -1, bytes([1] * 12))]

# Key, counter, nonce and keystream of RFC 8439: section 2.3.2; appendix A.1, vectors 1 and 2.

RFC_8439 = [
    (
        COUNTING,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        bytes(32),
        0,
        "00" * 12,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "00" * 12,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
]


@pytest.mark.parametrize(("key", "counter", "nonce", "stream"), RFC_8439)
def test_keystream_has_the_vectors_of_rfc_8439(key, counter, nonce, stream):
    want = np.frombuffer(bytes.fromhex(stream), "<u4")
    assert (chacha20_block(key, counter, bytes.fromhex(nonce)) == want).all()
    for variant in VARIANTS:
        mask = Mask(key, 1, bytes.fromhex(nonce))
        got = mask_add(np.zeros(16, np.uint32), [mask], position=16 * counter, variant=variant)
        assert got.tobytes() == bytes.fromhex(stream)


def test_keystream_hides_the_text_of_rfc_8439():
    # section 2.4.2: 114 bytes, so the last word of the message is not whole
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    cipher = (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593d"
        "abcd62b3571639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16cc"
        "f806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42874d"
    )
    mask = Mask(COUNTING, 1, bytes.fromhex("000000000000004a00000000"))
    for variant in VARIANTS:
        stream = mask_add(np.zeros(29, np.uint32), [mask], position=16, variant=variant).tobytes()
        assert bytes(a ^ b for a, b in zip(stream, text, strict=False)).hex() == cipher


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_of_a_mask_are_the_mask(variant):
    whole = mask_add(np.zeros(1500, np.uint32), MASKS, variant=variant)
    cuts = [0, 1, 5, 16, 250, 257, 768, 1500]  # within blocks and groups, and on their borders
    pieces = [
        mask_add(np.zeros(b - a, np.uint32), MASKS, position=a, variant=variant)
        for a, b in itertools.pairwise(cuts)
    ]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_the_end_of_a_mask():
    for variant in VARIANTS:
        got = mask_add(
            np.zeros(20, np.uint32), [Mask(COUNTING)], position=2**36 - 20, variant=variant
        )
        want = chacha20_block(COUNTING, [2**32 - 2, 2**32 - 1], bytes(12)).reshape(-1)[-20:]
        assert (got == want).all()
    with pytest.raises(InvalidInputError, match="position: a mask stream has 2\\^36 words"):
        mask_add(np.zeros(21, np.uint32), [Mask(COUNTING)], position=2**36 - 20)
