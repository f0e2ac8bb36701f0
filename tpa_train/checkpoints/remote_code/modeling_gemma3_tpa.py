"""Gemma 3 in Tensor Product Attention form, for transformers (4.57 and 5): inference only.

Stock Gemma 3 with another attention. What a token caches (latents, contextual factors, core activations; in 16, 8, 6,
4, 3 or 2 bits) is laid out as bytes [B, 1, L, bytes], keys and values apart, and goes through transformers' own cache
as if those were keys and values: windows, beams, cropping and assisted decoding are the library's. Keys of the latent
forms are rebuilt and rotated when read; the positions of cached tokens follow from those of the new ones, so padding
must be on the left, as ``generate`` wants it. Sums are in the order of the toolkit's own: a last digit decides where a
number between two codes falls.

Shapes: B batch, L new tokens, S tokens seen, D hidden size, H query heads, G key/value heads, d head_dim, r rank.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3ForCausalLM,
    eager_attention_forward,
)

from .configuration_gemma3_tpa import Gemma3TPAConfig

GROUP = 32  # numbers that share a scale and a minimum, both float16
PLANES = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}  # codes are stored in bytes of these widths, lowest first


def plane_bytes(count, width):
    """Returns the bytes of ``count`` codes of one plane."""
    return -(-count * width // 8)


def encode(x, bits):
    """Quantizes x [..., n]: codes uint8 [..., bytes], planes one after the other, in bytes of which the first code is
    lowest, and scales float16 [..., 2·⌈n/32⌉]."""
    count, top = x.shape[-1], 2**bits - 1
    # A group that is not full is filled with its last number, which moves neither bound.
    x = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], -count % GROUP)), -1).float().unflatten(-1, (-1, GROUP))
    low = x.amin(-1).clamp(-6e4, 6e4).half()
    scale = ((x.amax(-1) - low.float()) / top).clamp(6e-8, 6e4).half()
    codes = ((x - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top)
    codes = codes.flatten(-2)[..., :count].to(torch.uint8)
    planes, below = [], 0
    for width in PLANES[bits]:
        plane = F.pad(codes >> below & 2**width - 1, (0, -count % (8 // width))).unflatten(-1, (-1, 8 // width))
        planes.append((plane.int() << (width * torch.arange(8 // width, device=x.device))).sum(-1).to(torch.uint8))
        below += width
    codes = torch.cat(planes, -1)
    return codes, torch.stack((scale, low), -1).flatten(-2)


def decode(codes, scales, bits, count):
    """Returns the ``count`` numbers [..., n] that ``encode`` stored, float32."""
    planes, below, found = codes.split([plane_bytes(count, width) for width in PLANES[bits]], -1), 0, 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        shifts = width * torch.arange(8 // width, device=codes.device, dtype=torch.uint8)
        plane = (plane[..., None] >> shifts & 2**width - 1).flatten(-2)[..., :count]
        found, below = found | plane << below, below + width
    codes = found
    codes = F.pad(codes, (0, -count % GROUP)).unflatten(-1, (-1, GROUP)).float()
    scale, low = scales.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (codes * scale[..., None] + low[..., None]).flatten(-2)[..., :count]


def to_bytes(entries, layout):
    """Lays entries, each [B, L, rows, count], out as bytes [B, 1, L, bytes a token]."""
    parts = []
    for x, (_, _, segments) in zip(entries, layout, strict=True):
        for start, stop, bits in segments:
            part = x[..., start:stop]
            stored = (part,) if bits == 16 else encode(part, bits)
            parts += [t.contiguous().view(torch.uint8).flatten(-2) for t in stored]
    return torch.cat(parts, -1)[:, None]


def from_bytes(stored, layout, dtype):
    """Returns the entries [B, S, rows, count] that ``to_bytes`` laid out, in ``dtype`` (that of 16-bit segments)."""
    stored, entries, at = stored[:, 0], [], 0

    def take(rows, size, kind):
        nonlocal at
        size *= kind.itemsize
        part = stored[..., at : at + rows * size].unflatten(-1, (rows, size))
        at += rows * size
        return part.contiguous().view(kind)

    for rows, _, segments in layout:
        parts = []
        for start, stop, bits in segments:
            count = stop - start
            if bits == 16:
                parts.append(take(rows, count, dtype))
                continue
            codes = take(rows, sum(plane_bytes(count, width) for width in PLANES[bits]), torch.uint8)
            scales = take(rows, 2 * -(-count // GROUP), torch.float16)
            parts.append(decode(codes, scales, bits, count).to(dtype))
        entries.append(torch.cat(parts, -1))
    return entries


def rotate(x, rope):
    """Rotates the half-split pairs of x [B, L, heads, d]; float32."""
    cos, sin = rope
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_rms(x, eps):
    """Returns 1/rms of x [..., d] as float32 [..., 1]."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


class Factors(nn.Module):
    """The tensors of one part of the attention, by name; None where the part has no such tensor."""

    def __init__(self, shapes):
        super().__init__()
        for name in ("a", "heads", "features", "hidden", "bias"):  # not in every part
            self.register_parameter(name, None)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class Gemma3TPAAttention(Gemma3Attention):
    """Attention whose queries, keys, values and output projection are each in the form that the configuration says."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        plan = config.tpa_layers[layer_idx]
        self.forms, self.key_layout, self.value_layout = plan["forms"], plan["key_entries"], plan["value_entries"]
        self.theta, self.rope_factor = config.tpa_rope[config.layer_types[layer_idx]]
        self.groups, self.eps = config.num_key_value_heads, config.rms_norm_eps
        del self.k_proj, self.v_proj, self.o_proj, self.k_norm
        if self.forms["q"] != "dense":
            del self.q_proj
        for part in ("shared", "query_form", "keys", "values", "output_form"):
            self.add_module(part, Factors(plan["shapes"].get(part, {})))

    def rope(self, positions):
        """Returns cos and sin [B, S, 1, d/2] in float32, which bf16 models need as well."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        angles = positions.float()[..., None, None] * (1.0 / self.theta**exponent / self.rope_factor)
        return angles.cos(), angles.sin()

    # Contextual factors: K[g] = (1/R) Σ_r a_r[g] b_r.

    def outer_factors(self, part, x):
        """Returns a/R, float32 [B, L, R, heads] (or [R, heads] if constant), and b [B, L, R, d]."""
        a = part.a_bias.float()
        if part.a is not None:
            a = F.linear(x, part.a).unflatten(-1, part.a_bias.shape).float() + a
        return a / len(part.a_bias), F.linear(x, part.b).unflatten(-1, (-1, self.head_dim))

    # Tucker: U_feat Σ_h U_head[g, h] core[h] U_hiddenᵀ x.

    def features(self, part):
        return self.shared.features if part.features is None else part.features

    def core(self, part, x):
        """Returns core activations [B, L, rows, r]."""
        x = x if self.shared.hidden is None else x @ self.shared.hidden
        c = F.linear(x, part.core.flatten(0, 1)).unflatten(-1, part.core.shape[:2])
        return c if part.heads is None or self.mixes(part) else self.mix(part, c)

    def mixes(self, part):
        """Whether fewer rows than heads are cached, so that heads are mixed when they are read."""
        return part.heads is not None and part.heads.shape[1] < self.groups

    def mix(self, part, c):
        return torch.einsum("bshr,gh->bsgr", c, part.heads.to(c.dtype))

    # What a token caches, and what is read of it.

    def queries(self, x):
        match self.forms["q"]:
            case "dense":
                return self.q_proj(x).unflatten(-1, (-1, self.head_dim))
            case "contextual":
                a, b = self.outer_factors(self.query_form, x)
                return torch.einsum("blrh,blrd->blhd", a.to(b.dtype), b)
            case "tucker":
                return self.core(self.query_form, x) @ self.features(self.query_form).mT

    def write_keys(self, x, rope):
        """Returns the entries [B, L, rows, count] of tokens x [B, L, D]."""
        part = self.keys
        match self.forms["k"]:
            case "dense":
                k = F.linear(x, part.proj).unflatten(-1, (self.groups, -1))
                entries = [rotate(k * inverse_rms(k, self.eps) * (1.0 + part.norm.float()), rope)]
            case "latent" | "constant_b":
                c = F.linear(x, part.down).unflatten(-1, (self.groups, -1)).float()
                gram = torch.einsum("gdr,gds->grs", part.up.float(), part.up.float())
                square = (torch.einsum("blgr,grs->blgs", c, gram) * c).sum(-1, keepdim=True)
                entries = [c * torch.rsqrt(square / self.head_dim + self.eps) - part.center.float()]
            case "joint":
                entries = [(F.linear(x, part.down) - part.center)[:, :, None].to(x.dtype)]
                if len(self.key_layout) > 1:  # 1/rms of the keys that the cache gives back
                    layout = self.key_layout[:1]
                    latent = from_bytes(to_bytes(entries, layout), layout, x.dtype)[0].float() + part.center.float()
                    keys = torch.einsum("bsr,gdr->bsgd", latent[:, :, 0], part.up.float())
                    entries.append(inverse_rms(keys, self.eps).mT)
            case "contextual" | "constant_a":
                a, b = self.outer_factors(part, x)
                gram = torch.einsum("blrd,blsd->blrs", b.float(), b.float())
                square = (gram @ a * a).sum(-2, keepdim=True).clamp_min(0)
                inverse = torch.rsqrt(square / self.head_dim + self.eps)  # [B, L, 1, G]
                b = rotate(b.float() * (1.0 + part.norm.float()), rope)
                entries = [a * inverse, b] if a.dim() == 4 else [b, inverse]
            case "tucker":
                c = self.core(part, x).float()
                heads = self.mix(part, c) if self.mixes(part) else c
                up = self.features(part).float()
                square = ((heads @ (up.mT @ up)) * heads).sum(-1, keepdim=True) / self.head_dim + self.eps
                if self.mixes(part):  # heads share latents, not norms
                    size = square.mean(-2, keepdim=True).sqrt()
                    entries = [c / size - part.center.float(), (torch.rsqrt(square) * size).mT]
                else:
                    entries = [c * torch.rsqrt(square) - part.center.float()]
        return [entry.to(x.dtype) for entry in entries]

    def read_keys(self, entries, rope):
        """Returns keys [B, S, G, d], normalised and rotated."""
        part, entry = self.keys, entries[0]
        match self.forms["k"]:
            case "dense":
                return entry
            case "contextual":
                return torch.einsum("bsrg,bsrd->bsgd", entry, entries[1])
            case "constant_a":
                a = (part.a_bias / len(part.a_bias)).to(entry.dtype)
                return torch.einsum("rg,bsrd->bsgd", a, entry) * entries[1].mT
            case "latent" | "constant_b":
                up = ((1.0 + part.norm.float())[None, :, None] * part.up.float()).to(entry.dtype)
                keys = torch.einsum("bsgr,gdr->bsgd", entry + part.center.to(entry.dtype), up)
            case "joint":
                keys = torch.einsum("bsr,gdr->bsgd", (entry + part.center.to(entry.dtype))[:, :, 0], part.up).float()
                keys = keys * (inverse_rms(keys, self.eps) if len(entries) == 1 else entries[1].float().mT)
                keys = keys * (1.0 + part.norm.float())
            case "tucker":
                latent = entry + part.center.to(entry.dtype)
                latent = self.mix(part, latent) * entries[1].mT if self.mixes(part) else latent
                up = (1.0 + part.norm.float())[:, None] * self.features(part).float()
                keys = F.linear(latent, up.to(entry.dtype))
        return rotate(keys, rope).to(entry.dtype)

    def write_values(self, x):
        part = self.values
        match self.forms["v"]:
            case "dense":
                entries = [F.linear(x, part.proj).unflatten(-1, (self.groups, -1))]
            case "latent" | "constant_b":
                entries = [F.linear(x, part.down).unflatten(-1, (self.groups, -1)) - part.center]
            case "joint":
                entries = []  # the keys cache the latent
            case "contextual" | "constant_a":
                a, b = self.outer_factors(part, x)
                entries = [a.to(b.dtype), b] if a.dim() == 4 else [b]
            case "tucker":
                entries = [self.core(part, x) - part.center]
        return entries

    def read_values(self, entries, key_entries):
        """Returns what attention averages, [B, S, G, e]."""
        part = self.values
        match self.forms["v"]:
            case "dense" | "latent" | "constant_b":
                return entries[0]
            case "joint":
                return torch.einsum("bsr,gdr->bsgd", key_entries[0][:, :, 0], part.up)
            case "contextual":
                return torch.einsum("bsrg,bsrd->bsgd", *entries)
            case "constant_a":
                b = entries[0]
                return torch.einsum("rg,bsrd->bsgd", (part.a_bias / len(part.a_bias)).to(b.dtype), b)
            case "tucker":
                return self.mix(part, entries[0]) if self.mixes(part) else entries[0]

    def project_output(self, heads):
        """Projects [B, L, H, e] to [B, L, D]."""
        if self.forms["o"] == "dense":
            out, bias = F.linear(heads.flatten(-2), self.values.out), self.values.bias
            return out if bias is None else out + bias
        part = self.output_form
        z = heads @ self.features(part) if self.forms["v"] == "dense" else heads
        out = z.flatten(-2) @ part.core.flatten(0, 1)
        return (out if self.shared.hidden is None else out @ self.shared.hidden.mT) + part.bias

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        cache=None,
        **kwargs,
    ):
        """As ``Gemma3Attention.forward``; ``cache`` is the newer name of ``past_key_values``."""
        cache, length = past_key_values if cache is None else cache, hidden_states.shape[1]
        rope = self.rope(position_ids)
        query = self.queries(hidden_states)
        query = rotate(self.q_norm(query), rope).to(query.dtype)
        keys = to_bytes(self.write_keys(hidden_states, rope), self.key_layout)
        values = self.write_values(hidden_states)
        values = to_bytes(values, self.value_layout) if values else keys[..., :0]
        if cache is not None:
            known = cache.layers[self.layer_idx :][:1]  # dynamic caches of older versions grow with the first tokens
            if known and known[0].is_compileable:
                raise ValueError("Gemma 3 in TPA form needs a dynamic cache; leave cache_implementation out.")
            keys, values = cache.update(keys, values, self.layer_idx)
        past = keys.shape[2] - length
        if past:
            before = position_ids[:, :1] - past + torch.arange(past, device=position_ids.device)
            # Padding on the left came before position 0, and is masked.
            rope = self.rope(torch.cat((before, position_ids), dim=1).clamp_min(0))
        key_entries = from_bytes(keys, self.key_layout, query.dtype)
        value_entries = from_bytes(values, self.value_layout, query.dtype)
        key = self.read_keys(key_entries, rope).transpose(1, 2)
        value = self.read_values(value_entries, key_entries).transpose(1, 2)
        width, implementation = value.shape[-1], self.config._attn_implementation
        if implementation != "eager" and width < self.head_dim:  # flash kernels want equal head sizes
            value = F.pad(value, (0, self.head_dim - width))
        attend = eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        heads, weights = attend(
            self, query.transpose(1, 2), key, value, attention_mask,
            dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.project_output(heads[..., :width]), weights


class Gemma3TPAForCausalLM(Gemma3ForCausalLM):
    """Gemma 3 for text, with a smaller cache; everything but the attention is transformers' own."""

    config_class = Gemma3TPAConfig
    _can_compile_fullgraph = False  # a static cache would be read beyond its end

    def __init__(self, config):
        super().__init__(config)
        for index, plan in enumerate(config.tpa_layers):
            if plan is not None:
                self.model.layers[index].self_attn = Gemma3TPAAttention(config, index)
