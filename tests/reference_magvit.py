"""MAGVIT's arithmetic once more, as plain and slow as possible: numpy in float64, channels last, straight on weights in the released layout.

Written from the published description (arXiv 2212.05199; module names of google-research/magvit), with nothing from `vpenc`, so that two
independent readings can be compared. Weights are a flat dict such as `{"encoder/Conv_0/kernel": (3,3,3,3,F), ...}`; layers take their numbers in the
order in which they are called, as flax gives them. `nested` makes the tree of dicts that a checkpoint holds.
"""
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass
class Case:
    "The sizes of a tokenizer, a discriminator and a transformer."
    filters: int = 8
    multipliers: tuple = (1, 2, 4)
    n_res: int = 1
    time: tuple = (True, True)
    kernel: int = 3  # in time; 0: a 2D net, whose kernels have no time
    dim: int = 6
    codes: int = 10
    judge: tuple = (2, 4, 4, 4)
    length: int = 8
    size: int = 16
    layers: int = 2
    hidden: int = 12
    heads: int = 3
    mlp: int = 20
    grid: tuple = (2, 4, 4)
    classes: int = 0
    multi_task: bool = False

    def but(self, **changes): return replace(self, **changes)

    @property
    def vocabulary(self): return self.codes + self.classes + 1 + (16 if self.multi_task else 1)


# ---- weights
def conv_shape(case, i, o, kernel=3):
    if kernel == 1: return (1,) * (3 if case.kernel else 2) + (i, o)
    return ((case.kernel,) if case.kernel else ()) + (3, 3, i, o)


def vq_shapes(case):
    shapes, F, m = {}, case.filters, case.multipliers
    def norm(name, c): shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (c,)
    def block(name, i, o):
        norm(f"{name}/GroupNorm_0", i)
        norm(f"{name}/GroupNorm_1", o)
        shapes[f"{name}/Conv_0/kernel"], shapes[f"{name}/Conv_1/kernel"] = conv_shape(case, i, o), conv_shape(case, o, o)
        if i != o: shapes[f"{name}/Conv_2/kernel"] = conv_shape(case, i, o, 1)
    shapes["encoder/Conv_0/kernel"] = conv_shape(case, 3, F)
    widths, before = [F * k for k in m for _ in range(case.n_res)] + [F * m[-1]] * case.n_res, F
    for n, width in enumerate(widths): block(f"encoder/ResBlock_{n}", before, before := width)
    norm("encoder/GroupNorm_0", before)
    shapes["encoder/Conv_1/kernel"], shapes["encoder/Conv_1/bias"] = conv_shape(case, before, case.dim, 1), (case.dim,)
    def conv(n, i, o): shapes[f"decoder/Conv_{n}/kernel"], shapes[f"decoder/Conv_{n}/bias"] = conv_shape(case, i, o), (o,)
    conv(0, case.dim, F * m[-1])
    before = F * m[-1]
    for n, width in enumerate([F * m[-1]] * case.n_res + [F * k for k in reversed(m) for _ in range(case.n_res)]):
        block(f"decoder/ResBlock_{n}", before, before := width)
    for n, k in enumerate(reversed(m[1:]), 1): conv(n, F * k, F * k)
    conv(len(m), F * m[0], 3)
    norm("decoder/GroupNorm_0", F * m[0])
    shapes["quantizer/codebook"] = (case.codes, case.dim)
    return shapes


def judge_shapes(case):
    shapes, before, F = {}, case.filters, case.filters
    def conv(name, i, o, kernel=3, bias=True):
        shapes[f"{name}/kernel"] = conv_shape(case, i, o, kernel)
        if bias: shapes[f"{name}/bias"] = (o,)
    conv("Conv_0", 3, F)
    for n, k in enumerate(case.judge):
        conv(f"ResBlock_{n}/Conv_0", before, before)
        conv(f"ResBlock_{n}/Conv_1", before, F * k, 1, bias=False)
        conv(f"ResBlock_{n}/Conv_2", before, F * k)
        before = F * k
    conv("Conv_1", before, before)
    sides = [case.length, case.size, case.size]
    for _ in case.judge: sides = [(n + 1) // 2 for n in sides]
    shapes |= {"Dense_0/kernel": (math.prod(sides) * before, before), "Dense_0/bias": (before,), "Dense_1/kernel": (before, 1), "Dense_1/bias": (1,)}
    return shapes


def bert_shapes(case):
    D, h, hd = case.hidden, case.heads, case.hidden // case.heads
    shapes = {"BertEmbed_0/word_embeddings/embedding": (case.vocabulary, D),
              "BertEmbed_0/position_embeddings/embedding": (1 + case.multi_task + math.prod(case.grid), D)}
    def norm(name): shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (D,)
    def dense(name, i, o): shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = (i, o), (o,)
    norm("BertEmbed_0/embeddings_ln")
    for n in range(case.layers):
        attention, mlp = f"BertLayer_{n}/BertAttention_0", f"BertLayer_{n}/BertMlp_0"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/self_attention/{part}/kernel"], shapes[f"{attention}/self_attention/{part}/bias"] = (D, h, hd), (h, hd)
        shapes[f"{attention}/self_attention/out/kernel"], shapes[f"{attention}/self_attention/out/bias"] = (h, hd, D), (D,)
        norm(f"{attention}/attention_output_ln")
        dense(f"{mlp}/intermediate_output", D, case.mlp)
        dense(f"{mlp}/layer_output", case.mlp, D)
        norm(f"{mlp}/layer_output_ln")
    dense("BertMlmLayer_0/mlm_dense", D, D)
    norm("BertMlmLayer_0/mlm_ln")
    shapes["BertMlmLayer_0/mlm_bias/bias"] = (case.vocabulary,)
    return shapes


def random_weights(shapes, seed=0):
    "Random weights under which activations stay near 1; float32 values in float64 arrays."
    rng, weights = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape)
        if name.endswith("scale"): x = 1 + 0.1 * x
        elif name.endswith("bias"): x = 0.1 * x
        elif name.endswith("out/kernel"): x = x / math.sqrt(math.prod(shape[:-1]))
        elif name.endswith(("query/kernel", "key/kernel", "value/kernel")): x = x / math.sqrt(shape[0])
        elif name.endswith("kernel"): x = x / math.sqrt(math.prod(shape[:-1]))
        elif name.endswith("embedding"): x = 0.5 * x
        weights[name] = x.astype(np.float32).astype(np.float64)
    return weights


def nested(weights):
    "The tree of dicts, float32, as a checkpoint holds it."
    tree = {}
    for path, array in weights.items():
        *branches, leaf = path.split("/")
        place = tree
        for branch in branches: place = place.setdefault(branch, {})
        place[leaf] = array.astype(np.float32)
    return tree


# ---- layers; grids are (B,T,H,W,C)
def conv(w, name, x):
    "Zeros around every axis, one product for each place of the kernel."
    kernel = w[f"{name}/kernel"]
    if kernel.ndim == 4: kernel = kernel[None]
    sides = [k // 2 for k in kernel.shape[:3]]
    padded, out = np.pad(x, [(0, 0), *((s, s) for s in sides), (0, 0)]), 0
    T, H, W = x.shape[1:4]
    for t, i, j in itertools.product(*(range(k) for k in kernel.shape[:3])):
        out = out + padded[:, t:t + T, i:i + H, j:j + W] @ kernel[t, i, j]
    return out + w.get(f"{name}/bias", 0)


def group_norm(w, name, x):
    "Groups of neighbouring channels: 32, or the most of 16, 8, ... that leave two channels or more in each."
    channels, groups = x.shape[-1], 32
    while channels % groups or channels // groups < 2: groups //= 2
    size, out = channels // groups, np.empty_like(x)
    for b in range(len(x)):
        for first in range(0, channels, size):
            part = x[b, ..., first:first + size]
            out[b, ..., first:first + size] = (part - part.mean()) / np.sqrt(((part - part.mean()) ** 2).mean() + 1e-6)
    return out * w[f"{name}/scale"] + w[f"{name}/bias"]


def swish(x): return x / (1 + np.exp(-x))
def leaky(x): return np.where(x > 0, x, 0.2 * x)


def average_pool(x, time=True):
    "Cells of two; the last of an odd side holds one."
    steps = (2 if time else 1, 2, 2)
    sides = [-(-n // k) for n, k in zip(x.shape[1:4], steps)]
    out = np.empty((len(x), *sides, x.shape[-1]))
    for t, i, j in itertools.product(*map(range, sides)):
        cell = x[:, t * steps[0]:(t + 1) * steps[0], 2 * i:2 * i + 2, 2 * j:2 * j + 2]
        out[:, t, i, j] = cell.mean((1, 2, 3))
    return out


def upsample(x, time):
    for axis in (1, 2, 3)[0 if time else 1:]: x = x.repeat(2, axis)
    return x


# ---- the tokenizer
def res_block(w, name, x):
    y = conv(w, f"{name}/Conv_0", swish(group_norm(w, f"{name}/GroupNorm_0", x)))
    y = conv(w, f"{name}/Conv_1", swish(group_norm(w, f"{name}/GroupNorm_1", y)))
    return y + (conv(w, f"{name}/Conv_2", x) if f"{name}/Conv_2/kernel" in w else x)


def encoder(w, case, x):
    "(z, what each level gives before it is pooled and at the bottom)"
    x, numbers, levels = conv(w, "encoder/Conv_0", x), itertools.count(), []
    for level in range(len(case.multipliers)):
        for _ in range(case.n_res): x = res_block(w, f"encoder/ResBlock_{next(numbers)}", x)
        if level < len(case.multipliers) - 1:
            levels.append(x)
            x = average_pool(x, case.time[level])
    for _ in range(case.n_res): x = res_block(w, f"encoder/ResBlock_{next(numbers)}", x)
    return conv(w, "encoder/Conv_1", swish(group_norm(w, "encoder/GroupNorm_0", x))), [*levels, x]


def decoder(w, case, x):
    x, blocks, convs = conv(w, "decoder/Conv_0", x), itertools.count(), itertools.count(1)
    for _ in range(case.n_res): x = res_block(w, f"decoder/ResBlock_{next(blocks)}", x)
    for level in reversed(range(len(case.multipliers))):
        for _ in range(case.n_res): x = res_block(w, f"decoder/ResBlock_{next(blocks)}", x)
        if level: x = conv(w, f"decoder/Conv_{next(convs)}", upsample(x, case.time[level - 1]))
    return conv(w, f"decoder/Conv_{next(convs)}", swish(group_norm(w, "decoder/GroupNorm_0", x)))


def distances(w, z):  # (...,D) -> (...,K)
    return ((z[..., None, :] - w["quantizer/codebook"]) ** 2).sum(-1)


def quantiser_losses(w, z):
    d = distances(w, z)
    q = w["quantizer/codebook"][d.argmin(-1)]
    error = ((q - z) ** 2).mean()
    a = -d.reshape(-1, d.shape[-1]) / 0.01
    a = a - a.max(1, keepdims=True)
    p = np.exp(a) / np.exp(a).sum(1, keepdims=True)
    logs = a - np.log(np.exp(a).sum(1, keepdims=True))
    mean = p.mean(0)
    entropy = -(p * logs).sum(1).mean() - -(mean * np.log(mean + 1e-5)).sum()
    return dict(commitment=0.25 * error, codebook=error, entropy=0.1 * entropy)


# ---- the discriminator
def judge(w, case, x):
    x = leaky(conv(w, "Conv_0", x))
    for n in range(len(case.judge)):
        y = average_pool(leaky(conv(w, f"ResBlock_{n}/Conv_0", x)))
        y = leaky(conv(w, f"ResBlock_{n}/Conv_2", y))
        x = (conv(w, f"ResBlock_{n}/Conv_1", average_pool(x)) + y) / math.sqrt(2)
    x = leaky(conv(w, "Conv_1", x)).reshape(len(x), -1)
    x = leaky(x @ w["Dense_0/kernel"] + w["Dense_0/bias"])
    return (x @ w["Dense_1/kernel"] + w["Dense_1/bias"])[:, 0]


def r1(w, case, x, step=1e-4):
    "10 * mean over clips of the squared norm of the gradient, pixel by pixel from differences."
    total = 0
    for place in np.ndindex(*x.shape[1:]):
        up, down = x.copy(), x.copy()
        up[(slice(None), *place)] += step
        down[(slice(None), *place)] -= step
        total = total + ((judge(w, case, up) - judge(w, case, down)) / (2 * step)) ** 2
    return 10 * total.mean()


# ---- the transformer
def layer_norm(w, name, x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-12) * w[f"{name}/scale"] + w[f"{name}/bias"]


def gelu(x): return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
def dense(w, name, x): return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]


def bert(w, case, ids):  # negative ids count from the end of the table, as numpy's do
    "(logits of the whole vocabulary, (B,S,V); what each layer gives, (B,S,D))"
    words = w["BertEmbed_0/word_embeddings/embedding"]
    x = layer_norm(w, "BertEmbed_0/embeddings_ln", words[ids] + w["BertEmbed_0/position_embeddings/embedding"][:ids.shape[1]])
    states = []
    for n in range(case.layers):
        attention, mlp = f"BertLayer_{n}/BertAttention_0", f"BertLayer_{n}/BertMlp_0"
        seen = 0
        for head in range(case.heads):
            q, k, v = (x @ w[f"{attention}/self_attention/{part}/kernel"][:, head] + w[f"{attention}/self_attention/{part}/bias"][head]
                       for part in ("query", "key", "value"))
            scores = q @ k.transpose(0, 2, 1) / math.sqrt(case.hidden // case.heads)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            seen = seen + scores / scores.sum(-1, keepdims=True) @ v @ w[f"{attention}/self_attention/out/kernel"][head]
        x = layer_norm(w, f"{attention}/attention_output_ln", seen + w[f"{attention}/self_attention/out/bias"] + x)
        y = dense(w, f"{mlp}/layer_output", gelu(dense(w, f"{mlp}/intermediate_output", x)))
        x = layer_norm(w, f"{mlp}/layer_output_ln", y + x)
        states.append(x)
    y = layer_norm(w, "BertMlmLayer_0/mlm_ln", gelu(dense(w, "BertMlmLayer_0/mlm_dense", x)))
    return y @ words.T + w["BertMlmLayer_0/mlm_bias/bias"], states


MASK, PREDICTION = -1, -4


def sequence(case, tokens, labels=None):
    "[task] class, then the flattened grid (B,T,H,W)."
    front = [np.full(len(tokens), case.codes + case.classes) if labels is None else case.codes + labels]
    if case.multi_task: front.insert(0, np.full(len(tokens), PREDICTION))
    return np.concatenate([np.stack(front, 1), tokens.reshape(len(tokens), -1)], 1)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def grid_logits(w, case, tokens, labels=None):
    logits, _ = bert(w, case, sequence(case, tokens, labels))
    return logits[:, -math.prod(case.grid):, :case.codes].reshape(*tokens.shape, case.codes)


def masked(case, codes, still, scores, count):
    "The `count` lowest scores of each clip lose their code: to the still clip's in the first slice, to MASK elsewhere. (tokens, which)"
    tokens, lost = codes.copy(), np.zeros(codes.shape, bool)
    for b in range(len(codes)):
        for place in sorted(np.ndindex(*case.grid), key=lambda place: scores[(b, *place)])[:count]:
            lost[(b, *place)] = True
            tokens[(b, *place)] = still[(b, *place)] if place[0] == 0 else MASK
    return tokens, lost


def commit_loss(w, case, codes, still, rate, scores, smoothing=1e-4):
    count = min(max(math.floor(math.prod(case.grid) * rate), 1), math.prod(case.grid))
    tokens, _ = masked(case, codes, still, scores, count)
    logs, loss = log_softmax(grid_logits(w, case, tokens)), 0
    target = np.full(logs.shape, smoothing / case.codes)
    np.put_along_axis(target, codes[..., None], 1 - smoothing + smoothing / case.codes, -1)
    for b in range(len(codes)): loss += -(target[b] * logs[b]).sum(-1).mean() / len(codes)
    return loss


def schedule(method, progress, n):
    rate = math.cos(math.pi / 2 * progress) if method == "cosine" else 1 - 2 ** (-math.log2(n) * (1 - progress))
    return min(max(rate, 1e-6), 1)


def decode(w, case, still, noises, steps, method, choice_temperature):
    "Codes drawn in `steps` passes; `noises` yields Gumbel noise, for the codes (B,T,H,W,K) and for the scores (B,T,H,W) in turn."
    n = math.prod(case.grid)
    tokens, unknown = masked(case, np.zeros_like(still), still, np.zeros(still.shape), n)
    for step in range(steps):
        logits = grid_logits(w, case, tokens)
        drawn = (logits + next(noises)).argmax(-1)
        codes = np.where(unknown, drawn, tokens)
        progress = (step + 1) / steps
        scores = np.take_along_axis(log_softmax(logits), codes[..., None], -1)[..., 0] + choice_temperature * (1 - progress) * next(noises)
        scores = np.where(unknown, scores, np.inf)
        count = min(max(math.floor(n * schedule(method, progress, n)), 1), unknown[0].sum() - 1)
        tokens, unknown = masked(case, codes, still, scores, count)
    return codes
