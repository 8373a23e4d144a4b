"""From latents to folded rows, from pooled rows to latents, and the same with projected pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..labels import LatentLayout
from ..ops.semantic_cross_attention import Tokens, semantic_cross_attention
from ..ops.semantic_pool import semantic_pool
from .calls import Call, Empty
from .layers import AttentionProjections, Projection, times
from .products import linear

_Layer = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out)


class _Head(NamedTuple):
    """How rows of latents become folded rows of the logits of a head.

    Attributes:
        rows: (R, a), the latents or what the first layer makes of them.
        weight, bias: (C or C + E, a) and (C or C + E), from them to folded rows.
        key: (a), from them to the bias of a key.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    key: Tensor | None

    def fold(self, begin: int, end: int | None) -> Tensor:
        """Some of the channels of the folded rows, (R, ...)."""
        return linear(self.rows, self.weight[begin:end], None if self.bias is None else self.bias[begin:end])


class _Logits(NamedTuple):
    """The logits' side of a folded call: (B, H, m', C), (B, H, m'), (B, H, m', height) and (B, H, m', width)."""

    rows: Tensor
    key_bias: Tensor | None
    row_bias: Tensor | None
    col_bias: Tensor | None


def _fold_logits(call: Call, latents: Tensor) -> _Logits:
    """From latents (B, m', D) to what the kernels multiply the features with."""
    batch, count, _ = latents.shape
    rows = latents.flatten(0, 1)
    channels, dtype = call.x.shape[1], call.table_dtype
    heads = _multiplied_heads(call, rows) if call.choice.logits == "product" else _chained_heads(call, rows)
    folded = _join_heads([head.fold(0, channels) for head in heads], batch, count)
    keys = [head.rows.mv(head.key) for head in heads if head.key is not None]
    key_bias = _join_heads(keys, batch, count).to(dtype) if keys else None
    if call.encoding is None:
        return _Logits(folded.to(dtype), key_bias, None, None)
    encoded = folded
    if call.encoding.concatenated:
        encoded = _join_heads([head.fold(channels, None) for head in heads], batch, count)
    row_bias, col_bias = (linear(encoded, table).to(dtype) for table in (call.encoding.row, call.encoding.col))
    return _Logits(folded.to(dtype), key_bias, row_bias, col_bias)


def _logit_layers(call: Call) -> list[tuple[Projection, Projection]]:
    """For each head the layer of the latents, and that of the pixels, which is folded onto them."""
    attention = call.attention
    if call.pixels_attend:
        # The bias of a key changes all logits of a pixel alike.
        of_latents, of_pixels = attention.key._replace(bias=None), attention.query
    else:
        of_latents, of_pixels = attention.query, attention.key._replace(bias=None)
    count = attention.num_heads
    return list(zip(of_latents.heads(count), of_pixels.heads(count), strict=True))


def _chained_heads(call: Call, rows: Tensor) -> list[_Head]:
    heads = []
    for of_latents, of_pixels in _logit_layers(call):
        inner = times(of_latents.apply(rows), call.attention.scale * of_pixels.weight_scale)
        key = of_pixels.bias
        if key is not None:
            key = times(key, of_pixels.bias_scale / of_pixels.weight_scale)
        heads.append(_Head(inner, of_pixels.weight.t(), None, key))
    return heads


def _multiplied_heads(call: Call, rows: Tensor) -> list[_Head]:
    scale = call.attention.scale

    def multiply() -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        made = []
        for of_latents, of_pixels in _logit_layers(call):
            weight, bias = _compose(of_pixels.weight.t(), of_latents, scale * of_pixels.weight_scale)
            key = of_pixels.scaled_bias
            if key is not None:
                key = times(linear(key.unsqueeze(0), of_latents.weight.t())[0], scale * of_latents.weight_scale)
            made.append((weight, bias, key))
        return made

    return [_Head(rows, *maps) for maps in call.once("logits", multiply)]


def fold_for_latents(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """What the latents get (B, m, ...), and the mean and the second moment (B, C) of the features."""
    attention, encoding, present = call.attention, call.encoding, call.present
    latents = call.used_latents
    batch, count, _ = latents.shape
    logits = _fold_logits(call, latents)
    pool = semantic_pool(
        logits.rows,
        call.x,
        call.tokens,
        call.labels,
        row_bias=logits.row_bias,
        col_bias=logits.col_bias,
        # Those of a selection all have pixels, its padding is dropped.
        empty=call.empty if present is None else "zero",
    )
    pooled, mean = pool.pooled.to(call.dtype), pool.mean.to(call.dtype)
    if encoding is not None:
        row_mass, col_mass = pool.row_mass.to(call.dtype), pool.col_mass.to(call.dtype)
        pooled = encoding.join(pooled, linear(row_mass, encoding.row.t()) + linear(col_mass, encoding.col.t()))
        mean = encoding.join(mean, (encoding.row.mean(0) + encoding.col.mean(0)).expand(batch, -1))
    rows = [head.flatten(0, 1) for head in pooled.unbind(1)]
    if present is not None and call.empty == "uniform":
        rows = [torch.cat([head, mean]) for head in rows]
    out_bias = _with_zero_gradient(attention.out.scaled_bias, attention.key.bias)
    out = _apply_values(call, rows)
    if out_bias is not None:
        out = out + out_bias
    absent = out[batch * count :]
    out = out[: batch * count].view(batch, count, out.shape[1])
    if call.empty == "zero":
        absent = out.new_zeros(()) if out_bias is None else out_bias
        absent = absent.expand(batch, out.shape[2])
        if present is None:
            out = torch.where((pool.lse[:, 0] == -torch.inf).unsqueeze(-1), absent.unsqueeze(1), out)
    if present is not None:
        out = present.scatter(out, absent)
    return out, pool.mean, pool.second_moment


def _apply_values(call: Call, rows: list[Tensor]) -> Tensor:
    """Pooled rows (R, C or C + E) of each head through the layers of value and output, without the output's bias."""
    value, out = call.attention.value, call.attention.out
    heads = len(rows)
    if call.choice.values != "all":
        inner = torch.cat([layer.apply(head) for layer, head in zip(value.heads(heads), rows, strict=True)], -1)
        return out._replace(bias=None).apply(inner)

    def multiply() -> list[_Layer]:
        pairs = zip(out.weight.chunk(heads, 1), value.heads(heads), strict=True)
        return [_compose(weight, layer, out.weight_scale) for weight, layer in pairs]

    layers = call.once("values", multiply)
    parts = [linear(head, weight, bias) for head, (weight, bias) in zip(rows, layers, strict=True)]
    return _total(parts)


class FoldedForPixels(NamedTuple):
    """What the pixels attend to: logits, and for each result rows (B, H, m', C), a bias (C), and what a pixel without
    latents gets (B, C), or None where ``empty`` says it."""

    logits: _Logits
    values: list[Tensor]
    biases: list[Tensor | None]
    of_empty: list[Tensor | None]
    empty: Empty


def fold_for_pixels(call: Call) -> FoldedForPixels:
    """What the pixels attend to, and what they get from it."""
    dtype = call.table_dtype
    latents = call.used_latents
    batch, count, _ = latents.shape
    logits = _fold_logits(call, latents)
    rows, with_mean, empty = _rows_of_values(call, latents)
    folded, biases = _fold_values(call, rows)
    biases[0] = _with_zero_gradient(biases[0], call.attention.key.bias)
    values = [_join_heads([head[: batch * count] for head in heads], batch, count).to(dtype) for heads in folded]
    of_empty: list[Tensor | None] = [None] * len(folded)
    if with_mean:
        of_empty = [_total([head[batch * count :] for head in heads]).to(dtype) for heads in folded]
    return FoldedForPixels(
        logits, values, [None if bias is None else bias.to(dtype) for bias in biases], of_empty, empty
    )


def _rows_of_values(call: Call, latents: Tensor) -> tuple[Tensor, bool, Empty]:
    """Latents (B, m', D) as the rows that values are made of, and how pixels without latents get theirs.

    Returns:
        the rows (R, D); whether the last B of them are the mean of all latents, which such pixels get; and otherwise
        by which rule.
    """
    rows = latents.flatten(0, 1)
    if call.present is None:
        return rows, False, call.empty
    if call.empty == "zero" or not call.present.leaves_out_pixels or call.layout.count == 0:
        return rows, False, "zero"
    return torch.cat([rows, call.latents.mean(1)]), True, "uniform"  # the mean of linear functions is that of the mean


def _fold_values(call: Call, rows: Tensor) -> tuple[list[list[Tensor]], list[Tensor | None]]:
    """Rows (R, D) of latents through the layers of value, output and tails.

    Returns:
        for each result the rows (R, C) of each head, and the bias (C) that is the same for all rows.
    """
    attention, tails = call.attention, call.tails
    value, out, heads = attention.value, attention.out, attention.num_heads
    order = call.choice.values
    if order == "all":

        def multiply() -> list[tuple[list[_Layer], Tensor | None]]:
            made = []
            for weight, bias in _layers_behind_value(call):
                pairs = zip(weight.chunk(heads, 1), value.heads(heads), strict=True)
                made.append(([_compose(part, layer) for part, layer in pairs], bias))
            return made

        by_result = call.once("values", multiply)
        return [[linear(rows, *layer) for layer in layers] for layers, _ in by_result], [bias for _, bias in by_result]

    inner = value.apply(rows)
    folded: list[list[Tensor]] = []
    if order == "out" or not tails:
        for weight, _ in (layers_behind := _layers_behind_value_once(call)):
            pairs = zip(inner.chunk(heads, -1), weight.chunk(heads, 1), strict=True)
            folded.append([linear(head, part) for head, part in pairs])
        return folded, [bias for _, bias in layers_behind]

    parts = out.weight.chunk(heads, 1)
    inner = times(inner, out.weight_scale)
    attended = [linear(head, part) for head, part in zip(inner.chunk(heads, -1), parts, strict=True)]
    out_bias = out.scaled_bias
    if out_bias is not None:
        # One row more costs less than another product with the same weight, and its gradient.
        attended[0] = torch.cat([attended[0], out_bias.unsqueeze(0)])
    biases: list[Tensor | None] = []
    for tail in tails:
        results = [linear(times(head, tail.weight_scale), tail.weight) for head in attended]
        bias = tail.scaled_bias
        if out_bias is not None:
            bias = results[0][-1] if bias is None else results[0][-1] + bias
            results[0] = results[0][:-1]
        folded.append(results)
        biases.append(bias)
    return folded, biases


def _layers_behind_value_once(call: Call) -> list[_Layer]:
    return call.once("out", lambda: _layers_behind_value(call)) if call.tails else _layers_behind_value(call)


def _layers_behind_value(call: Call) -> list[_Layer]:
    """For each result the weight (C, d) and the bias (C) of the layers of output and tail in one."""
    out = call.attention.out
    if not call.tails:
        return [(times(out.weight, out.weight_scale), out.scaled_bias)]
    layers: list[_Layer] = []
    for tail in call.tails:
        weight, bias = _compose(tail.weight, out, tail.weight_scale)
        if tail.scaled_bias is not None:
            bias = tail.scaled_bias if bias is None else bias + tail.scaled_bias
        layers.append((weight, bias))
    return layers


def project_for_latents(call: Call) -> Tensor:
    """What the latents get (B, m, ...)."""
    attention, present = call.attention, call.present
    pixels, latents = pixel_rows(call), call.used_latents
    key = attention.key._replace(bias=None).apply(pixels)
    query, value = attention.query.apply(latents), attention.value.apply(pixels)
    # Those of a selection all have pixels, its padding is dropped.
    empty = call.empty if present is None else "zero"
    attended = _attend(attention, query, key, value, call.tokens, call.labels, empty)
    if present is None:
        out = attention.out.apply(attended)
    else:
        batch, count, width = attended.shape
        absent = value.new_zeros(batch, width)
        if call.empty == "uniform":
            absent = value.sum(1) / max(value.shape[1], 1)
        rows = attention.out.apply(torch.cat([attended.flatten(0, 1), absent]))
        of_present, of_absent = rows.split([batch * count, batch])
        out = present.scatter(of_present.view(batch, count, rows.shape[1]), of_absent)
    zero = _with_zero_gradient(None, attention.key.bias)
    return out if zero is None else out + zero


def project_for_pixels(call: Call) -> list[Tensor]:
    """The result of the attention, or of each tail behind it, (B, C, height, width)."""
    attention = call.attention
    latents = call.used_latents
    batch, count, _ = latents.shape
    key = attention.key._replace(bias=None).apply(latents)
    zero = _with_zero_gradient(None, attention.key.bias)
    if zero is not None:
        key = key + zero
    query = attention.query.apply(pixel_rows(call))
    sources, with_mean, empty = _rows_of_values(call, latents)
    value, of_empty = attention.value.apply(sources), None
    if with_mean:
        value, of_empty = value.split([batch * count, batch])
    value = value.view(batch, count, value.shape[1])
    inner = _attend(attention, query, key, value, call.labels, call.tokens, empty, of_empty)
    rows = inner.flatten(0, 1)
    if call.choice.values == "out" or not call.tails:
        layers = _layers_behind_value_once(call)
    else:
        rows = attention.out.apply(rows)
        layers = [(times(tail.weight, tail.weight_scale), tail.scaled_bias) for tail in call.tails]
    results = []
    for weight, bias in layers:
        # The other way round: the result then has adjacent pixels, like the features that it is combined with.
        result = linear(weight, rows)
        if bias is not None:
            result = result + bias.unsqueeze(1)
        batch, _, height, width = call.x.shape
        results.append(result.view(result.shape[0], batch, height, width).transpose(0, 1))
    return results


def project_for_themselves(latents: Tensor, layout: LatentLayout, attention: AttentionProjections) -> Tensor:
    """What latents get that attend to each other (B, m, ...)."""
    query = attention.query.apply(latents)
    key = attention.key._replace(bias=None).apply(latents)
    attended = _attend(attention, query, key, attention.value.apply(latents), layout, layout, "uniform")
    out = attention.out.apply(attended)
    zero = _with_zero_gradient(None, attention.key.bias)
    return out if zero is None else out + zero


def pixel_rows(call: Call) -> Tensor:
    """The pixels with their encoding, (B, n, C or C + E)."""
    x = call.x.to(call.dtype)
    return (x if call.encoding is None else call.encoding.encode(x)).flatten(2).transpose(1, 2)


def _attend(
    attention: AttentionProjections,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_tokens: Tokens,
    key_tokens: Tokens,
    empty: Empty,
    of_empty: Tensor | None = None,
) -> Tensor:
    """The attention between (B, Nq, d) and (B, Nk, d), heads one after the other in d.

    A query without keys gets the mean of all values, or zero, or what is given (B, d).
    """
    heads = attention.num_heads
    query, key, value = (rows.unflatten(-1, (heads, -1)).transpose(1, 2) for rows in (query, key, value))
    out = semantic_cross_attention(
        query,
        key,
        value,
        query_tokens,
        key_tokens,
        scale=attention.scale,
        empty=empty,
        empty_value=None if of_empty is None else of_empty.unflatten(-1, (heads, -1)),
    )
    return out.transpose(1, 2).flatten(2)


def _compose(outer: Tensor, inner: Projection, factor: float = 1.0) -> _Layer:
    """The weight (c, q) and the bias (c) of ``outer`` (c, p) times ``factor`` behind ``inner`` (p, q)."""
    rows = times(inner.weight.t(), inner.weight_scale * factor)
    if inner.bias is None:
        return linear(rows, outer).t(), None
    # The bias is one more column of the weight: another product with ``outer`` would cost more, and so its gradient.
    rows = torch.cat([rows, times(inner.bias, inner.bias_scale * factor).unsqueeze(0)])
    result = linear(rows, outer)
    return result[:-1].t(), result[-1]


def _join_heads(heads: list[Tensor], batch: int, count: int) -> Tensor:
    """From (B * m, ...) of each head to (B, H, m, ...)."""
    by_image = [head.reshape(batch, count, *head.shape[1:]) for head in heads]
    return by_image[0].unsqueeze(1) if len(by_image) == 1 else torch.stack(by_image, 1)


def _total(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum(0)


def _with_zero_gradient(tensor: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The same numbers, from which a bias that cancels gets a gradient of zeros rather than none at all.

    None stands for zero.
    """
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return tensor
    zero = bias[:0].sum()
    return zero if tensor is None else tensor + zero
