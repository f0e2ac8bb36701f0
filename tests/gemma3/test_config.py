"""The five published sizes, as Google publishes them, and refusals of bad configurations."""

import dataclasses

import pytest

from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES, Gemma3Config, layer_pattern

TABLE = {  # local, global, D, H, G, d, W, FFN, query_pre_attn_scalar, rope scaling
    "270m": (15, 3, 640, 4, 1, 256, 512, 2048, 256, 1),
    "1b": (22, 4, 1152, 4, 1, 256, 512, 6912, 256, 1),
    "4b": (29, 5, 2560, 8, 4, 256, 1024, 10240, 256, 8),
    "12b": (40, 8, 3840, 16, 8, 256, 1024, 15360, 256, 8),
    "27b": (52, 10, 5376, 32, 16, 128, 1024, 21504, 168, 8),
}


def test_no_size_is_missing():
    assert set(SIZES) == set(TABLE)


@pytest.mark.parametrize("size", TABLE)
def test_sizes_are_the_published_ones(size):
    c, (local, global_, *rest) = SIZES[size], TABLE[size]
    assert (c.layer_kinds.count("local"), c.layer_kinds.count("global")) == (local, global_)
    assert c.num_layers == len(c.layer_kinds) == local + global_
    assert rest == [
        c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.sliding_window, c.intermediate_size,
        c.query_pre_attn_scalar, c.rope_scaling_factor,
    ]  # fmt: skip
    assert (c.vocab_size, c.rope_theta, c.rope_local_theta) == (262_144, 1e6, 1e4)
    assert c.scale == pytest.approx(c.query_pre_attn_scalar**-0.5, rel=1e-15)


@pytest.mark.parametrize("size", TABLE)
def test_every_sixth_layer_is_global(size):
    config = SIZES[size]
    assert [i for i in range(config.num_layers) if config.is_global(i)] == list(range(5, config.num_layers, 6))
    assert config.layer_kinds == layer_pattern(config.num_layers)


@pytest.mark.parametrize("size,context,share", [("270m", 32_768, 0.93), ("27b", 131_072, 0.96)])
def test_global_layers_hold_nearly_all_of_a_long_cache(size, context, share):
    config = SIZES[size]
    counts = [config.cached_tokens(i, context) for i in range(config.num_layers)]
    global_ = sum(n for i, n in enumerate(counts) if config.is_global(i))
    assert global_ / sum(counts) == pytest.approx(share, abs=0.005)
    assert {n for i, n in enumerate(counts) if not config.is_global(i)} == {config.sliding_window}
    assert set(config.cached_tokens(i, 100) for i in range(config.num_layers)) == {100}


@pytest.mark.parametrize("size", TABLE)
def test_round_trip(size):
    config = dataclasses.replace(SIZES[size], layer_kinds=tuple(reversed(SIZES[size].layer_kinds)))
    assert Gemma3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "key,nearest", [("hiden_size", "hidden_size"), ("num_kv_head", "num_kv_heads"), ("rope_thetta", "rope_theta")]
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(UserError, match=rf"'{key}'.*did you mean '{nearest}'"):
        Gemma3Config.from_dict({**SIZES["270m"].to_dict(), key: 3})


def test_an_unknown_key_like_no_other_lists_the_valid_ones():
    with pytest.raises(UserError, match="valid: .*head_dim.*sliding_window"):
        Gemma3Config.from_dict({"zzz": 3})


@pytest.mark.parametrize(
    "values,message",
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads .6. must be a multiple of num_kv_heads .4."),
        ({"head_dim": 7}, "head_dim .7. must be even"),
        ({"num_layers": 3, "layer_kinds": ("local",)}, "names 1 layers but num_layers is 3"),
    ],
)
def test_impossible_sizes_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Gemma3Config(**values)
