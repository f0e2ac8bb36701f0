"""Configuration of a Gemma 3 whose attention is in Tensor Product Attention form."""

from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig


class Gemma3TPAConfig(Gemma3TextConfig):
    """Gemma 3's text configuration, and two keys of its own.

    ``tpa_layers``: one item a layer, None where the attention is the original's. Else ``forms`` (of q, k, v and o),
    ``shapes`` (of every tensor of a part: keys, values, query_form, output_form, shared) and ``key_entries`` and
    ``value_entries``: what a token caches, as [rows, count, [[start, stop, bits], ...]].
    ``tpa_rope``: by layer type, the base and the factor that positions are divided by.
    """

    model_type = "gemma3_tpa"
