"""Fixtures of the checkpoint tests: a small tokenizer, and the real 270M where it is installed."""

from __future__ import annotations

import os

import pytest
from small_models import SPECIAL_IDS, vocabulary

from tpa_train.checkpoints import find_default
from tpa_train.errors import UserError
from tpa_train.gemma3.tokenizer import Tokenizer, sentencepiece_model


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_model_proto(sentencepiece_model(*vocabulary(), SPECIAL_IDS))


@pytest.fixture(scope="session")
def real_path():
    """Path of the real 270M, or a skip where its package is not installed."""
    try:
        return find_default("gemma3_270m")
    except UserError as error:
        if os.environ.get("CI"):  # the test extra installs the package there: its absence is a failure
            raise
        pytest.skip(str(error))
