"""VideoGPT's arithmetic once more, as plain and slow as possible, straight on a dict of weights in the original's layout.

Written from the published description (arXiv 2104.10157; module and parameter names of wilson1yan/VideoGPT), with nothing from `vpenc`, so
that two independent readings can be compared: explicit padding, 3D convolutions throughout, dense masks, one-hot classes, every formula
spelled out. `Case` also makes random weights with the original's names and shapes, and `write_checkpoint` the original's files.
"""
import argparse
import collections
import itertools
import math
import sys
import types
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass
class Case:
    "The sizes of a VQ-VAE and of a VideoGPT on it."
    hiddens: int = 16
    res_layers: int = 1
    dim: int = 12
    codes: int = 40
    downsample: tuple = (4, 4, 4)
    length: int = 16
    resolution: int = 32
    hidden: int = 24
    heads: int = 4
    layers: int = 2
    attn_type: str = "full"
    cond_frames: int = 1
    classes: int = 0
    widths: tuple = (8, 12, 16, 24)
    blocks: tuple = (2, 1, 2, 1)

    @property
    def latent(self): return tuple(n // d for n, d in zip((self.length, self.resolution, self.resolution), self.downsample))

    @property
    def n_layers_down(self): return int(math.log2(max(self.downsample)))

    def but(self, **changes): return replace(self, **changes)


# ---- weights
def vqvae_shapes(case):
    C, D, K = case.hiddens, case.dim, case.codes
    shapes = {}
    def norm(name, n):
        for part in ("weight", "bias", "running_mean", "running_var"): shapes[f"{name}.{part}"] = (n,)
        shapes[f"{name}.num_batches_tracked"] = ()
    def stack(name):
        for i in range(case.res_layers):
            block = f"{name}.{i}.block"
            norm(f"{block}.0", C)
            shapes[f"{block}.2.conv.weight"] = (C // 2, C, 3, 3, 3)
            norm(f"{block}.3", C // 2)
            shapes[f"{block}.5.conv.weight"] = (C, C // 2, 1, 1, 1)
            norm(f"{block}.6", C)
            for axis in "wht":
                for part in ("w_qs", "w_ks", "w_vs", "fc"): shapes[f"{block}.8.attn_{axis}.{part}.weight"] = (C, C)
                shapes[f"{block}.8.attn_{axis}.fc.bias"] = (C,)
        norm(f"{name}.{case.res_layers}", C)
    for i in range(case.n_layers_down):
        shapes[f"encoder.convs.{i}.conv.weight"] = (C, C if i else 3, 4, 4, 4)
        shapes[f"encoder.convs.{i}.conv.bias"] = (C,)
    shapes["encoder.conv_last.conv.weight"], shapes["encoder.conv_last.conv.bias"] = (C, C, 3, 3, 3), (C,)
    stack("encoder.res_stack")
    stack("decoder.res_stack")
    for i in range(case.n_layers_down):
        out = 3 if i == case.n_layers_down - 1 else C
        shapes[f"decoder.convts.{i}.convt.weight"], shapes[f"decoder.convts.{i}.convt.bias"] = (C, out, 4, 4, 4), (out,)
    shapes |= {"pre_vq_conv.conv.weight": (D, C, 1, 1, 1), "pre_vq_conv.conv.bias": (D,), "post_vq_conv.conv.weight": (C, D, 1, 1, 1),
               "post_vq_conv.conv.bias": (C,), "codebook.embeddings": (K, D), "codebook.N": (K,), "codebook.z_avg": (K, D)}
    return shapes


def gpt_shapes(case):
    H, W = case.hidden, case.widths[3]
    shapes = {f"vqvae.{name}": shape for name, shape in vqvae_shapes(case).items()}
    def norm(name):
        if case.classes: shapes[f"{name}.w.weight"] = shapes[f"{name}.wb.weight"] = (H, case.classes)
        else: shapes[f"{name}.g"] = shapes[f"{name}.b"] = (H,)
    def attention(name, source):
        shapes.update({f"{name}.w_qs.weight": (H, H), f"{name}.w_ks.weight": (H, source), f"{name}.w_vs.weight": (source, source),
                       f"{name}.fc.weight": (H, source), f"{name}.fc.bias": (H,)})
    def positions(name, grid, dim):
        for axis, n in enumerate(grid): shapes[f"{name}.emb.d_{axis}"] = (n, dim // 3)
    if case.cond_frames:
        shapes |= resnet_shapes(case)
        positions("cond_pos_embd", (case.cond_frames, case.resolution // 4, case.resolution // 4), W)
    shapes["fc_in.weight"] = (H, case.dim)
    shapes["attn_stack.right_shift.sos"] = (H,)
    positions("attn_stack.pos_embd", case.latent, H)
    for i in range(case.layers):
        block = f"attn_stack.attn_nets.{i}"
        norm(f"{block}.pre_attn_norm")
        attention(f"{block}.attn", H)
        if case.attn_type == "full": shapes[f"{block}.attn.attn.mask"] = (math.prod(case.latent),) * 2
        if case.cond_frames:
            norm(f"{block}.pre_enc_norm")
            attention(f"{block}.enc_attn", W)
        norm(f"{block}.pre_fc_norm")
        shapes |= {f"{block}.fc_block.0.weight": (4 * H, H), f"{block}.fc_block.0.bias": (4 * H,),
                   f"{block}.fc_block.2.weight": (H, 4 * H), f"{block}.fc_block.2.bias": (H,)}
    norm("norm")
    shapes["fc_out.weight"] = (case.codes, H)
    return shapes


def resnet_shapes(case):
    shapes = {}
    def norm(name, n): shapes[f"{name}.norm.norm.weight"] = shapes[f"{name}.norm.norm.bias"] = (n,)
    shapes["resnet.stem.0.weight"] = (case.widths[0], 3, 3, 3, 3)
    norm("resnet.stem.1", case.widths[0])
    before = case.widths[0]
    for group, (width, blocks) in enumerate(zip(case.widths, case.blocks), 1):
        for k in range(blocks):
            name, source = f"resnet.group{group}." + (f"blocks.{k - 1}" if k else "start_block"), width if k else before
            if not k:
                shapes[f"{name}.proj_conv.weight"] = (width, before, 1, 1, 1)
                norm(f"{name}.proj_bnr", width)
            shapes[f"{name}.conv1.weight"], shapes[f"{name}.conv2.weight"] = (width, source, 3, 3, 3), (width, width, 3, 3, 3)
            norm(f"{name}.bnr1", width)
            norm(f"{name}.bnr2", width)
        before = width
    return shapes


def random_weights(shapes, seed=0):
    "Random weights under which activations stay near 1 and logits near 0.15."
    generator = torch.Generator().manual_seed(seed)
    weights = collections.OrderedDict()
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"): x = torch.tensor(44)
        elif name.endswith("running_var"): x = 0.5 + torch.rand(shape, generator=generator)
        elif name.endswith(".mask"): x = torch.ones(shape).tril()
        elif name.endswith("codebook.N"): x = 0.2 + 3 * torch.rand(shape, generator=generator)
        elif name.endswith((".g", ".norm.weight")) or len(shape) == 1 and name.endswith(".weight"): x = 1 + 0.1 * x
        elif name.endswith((".w.weight", ".wb.weight")): x = 0.3 * x
        elif name == "fc_out.weight": x = x * 0.03
        elif "convt.weight" in name: x = x / math.sqrt(shape[0] * 8)
        elif len(shape) > 1 and "emb" not in name: x = x / math.sqrt(math.prod(shape[1:]))
        elif "emb.d_" in name or len(shape) == 1: x = 0.1 * x
        weights[name] = x
    for prefix in ("", "vqvae."):
        if f"{prefix}codebook.z_avg" in weights:
            weights[f"{prefix}codebook.z_avg"] = weights[f"{prefix}codebook.embeddings"] * weights[f"{prefix}codebook.N"][:, None]
    return weights


# ---- the VQ-VAE
def padded(x, kernel, stride):
    "Zeros around the last three axes: kernel - stride in all, the larger half in front."
    sides = []
    for s in reversed(stride): sides += [(kernel - s) // 2 + (kernel - s) % 2, (kernel - s) // 2]
    return F.pad(x, sides)


def convolve(w, name, x, stride=(1, 1, 1)):
    kernel = w[f"{name}.weight"]
    return F.conv3d(padded(x, kernel.shape[-1], stride), kernel, w.get(f"{name}.bias"), stride)


def convolve_transposed(w, name, x, stride):
    kernel = w[f"{name}.weight"]
    return F.conv_transpose3d(padded(x, kernel.shape[-1], stride), kernel, w[f"{name}.bias"], stride, padding=kernel.shape[-1] - 1)


def batch_norm(w, name, x, train, stats):
    "In train mode `stats` receives the new running statistics."
    if train:
        mean, var = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4), unbiased=False)
        n = x.numel() / x.shape[1]
        stats[f"{name}.running_mean"] = 0.9 * w[f"{name}.running_mean"] + 0.1 * mean.detach()
        stats[f"{name}.running_var"] = 0.9 * w[f"{name}.running_var"] + 0.1 * var.detach() * n / (n - 1)
        stats[f"{name}.num_batches_tracked"] = w[f"{name}.num_batches_tracked"] + 1
    else: mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    column = lambda v: v.view(1, -1, 1, 1, 1)
    return (x - column(mean)) / torch.sqrt(column(var) + 1e-5) * column(w[f"{name}.weight"]) + column(w[f"{name}.bias"])


def softmax_attention(q, k, v, heads, seen=None):  # (..., S, C); seen: bool (S, N)
    def split(x): return torch.stack(x.chunk(heads, -1), -3)  # (..., heads, S, C/heads)
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if seen is not None: scores = torch.where(seen, scores, torch.tensor(-math.inf))
    y = torch.softmax(scores, -1) @ v
    return torch.cat(y.unbind(-3), -1)


def axial_attention(w, name, x):  # (B,C,T,H,W)
    total = 0
    for letter, axis in zip("wht", (4, 3, 2)):
        part = f"{name}.attn_{letter}"
        line = x.movedim(1, -1).movedim(axis - 1, -2)  # (B, other, other, axis, C)
        q, k, v = (line @ w[f"{part}.{p}.weight"].T for p in ("w_qs", "w_ks", "w_vs"))
        y = softmax_attention(q, k, v, 2) @ w[f"{part}.fc.weight"].T + w[f"{part}.fc.bias"]
        total = total + y.movedim(-2, axis - 1).movedim(-1, 1)
    return total


def residual_stack(w, name, x, train, stats):
    layers = len({key.split(".block.")[0] for key in w if key.startswith(f"{name}.") and ".block." in key})
    for i in range(layers):
        block = f"{name}.{i}.block"
        y = F.relu(batch_norm(w, f"{block}.0", x, train, stats))
        y = F.relu(batch_norm(w, f"{block}.3", convolve(w, f"{block}.2.conv", y), train, stats))
        y = F.relu(batch_norm(w, f"{block}.6", convolve(w, f"{block}.5.conv", y), train, stats))
        x = x + axial_attention(w, f"{block}.8", y)
    return F.relu(batch_norm(w, f"{name}.{layers}", x, train, stats))


def strides(downsample):
    "Of layer 0, 1, ...: halve an axis as long as it has halvings left."
    left, out = [int(math.log2(d)) for d in downsample], []
    while any(left):
        out.append(tuple(2 if n else 1 for n in left))
        left = [max(0, n - 1) for n in left]
    return out


def encoder(w, x, downsample, train=False, stats=None):  # -> (B,C,T',H',W')
    for i, stride in enumerate(strides(downsample)): x = F.relu(convolve(w, f"encoder.convs.{i}.conv", x, stride))
    return residual_stack(w, "encoder.res_stack", convolve(w, "encoder.conv_last.conv", x), train, stats)


def decoder(w, x, downsample, train=False, stats=None):
    x = residual_stack(w, "decoder.res_stack", x, train, stats)
    for i, stride in enumerate(strides(downsample)):
        if i: x = F.relu(x)
        x = convolve_transposed(w, f"decoder.convts.{i}.convt", x, stride)
    return x


def distances(w, z):  # (B,D,T,H,W) -> (N,K)
    flat, e = z.movedim(1, -1).flatten(0, -2), w["codebook.embeddings"]
    return (flat**2).sum(1, keepdim=True) - 2 * flat @ e.T + (e.T**2).sum(0, keepdim=True)


def vqvae_encode(w, clip, downsample):
    "z, codes, margin: by how much the second best code is farther than the best (squared distance)."
    z = convolve(w, "pre_vq_conv.conv", encoder(w, clip, downsample))
    d = distances(w, z)
    best = d.topk(2, largest=False).values
    grid = (len(z), *z.shape[2:])
    return z, d.argmin(1).view(grid), (best[:, 1] - best[:, 0]).view(grid)


def vqvae_decode(w, codes, downsample):
    e = w["codebook.embeddings"][codes].movedim(-1, 1)
    return decoder(w, convolve(w, "post_vq_conv.conv", e), downsample)


def tile(flat, n):
    "At least n rows: repeated with noise 0.01/sqrt(D) when there are fewer."
    if flat.shape[0] >= n: return flat
    repeats = (n + flat.shape[0] - 1) // flat.shape[0]
    flat = flat.repeat(repeats, 1)
    return flat + torch.randn_like(flat) * (0.01 / math.sqrt(flat.shape[1]))


def codebook_forward(w, z, train=False, first=False):
    "(straight-through embeddings, codes, commitment, perplexity, new buffers); `first`: data init, in train mode."
    w, new = dict(w), {}
    flat, K = z.detach().movedim(1, -1).flatten(0, -2), len(w["codebook.N"])
    if train and first:
        y = tile(flat, K)
        chosen = y[torch.randperm(len(y))][:K]
        w["codebook.embeddings"], w["codebook.z_avg"], w["codebook.N"] = chosen.clone(), chosen.clone(), torch.ones(K)
    codes = distances(w, z.detach()).argmin(1)
    onehot = F.one_hot(codes, K).float()
    codes = codes.view(len(z), *z.shape[2:])
    e = w["codebook.embeddings"][codes].movedim(-1, 1)
    if train:
        N, z_avg = 0.99 * w["codebook.N"] + 0.01 * onehot.sum(0), 0.99 * w["codebook.z_avg"] + 0.01 * (flat.T @ onehot).T
        n = N.sum()
        embeddings = z_avg / ((N + 1e-7) / (n + K * 1e-7) * n)[:, None]
        y = tile(flat, K)
        chosen = y[torch.randperm(len(y))][:K]
        new = {"codebook.N": N, "codebook.z_avg": z_avg, "codebook.embeddings": torch.where(N[:, None] >= 1, embeddings, chosen)}
    p = onehot.mean(0)
    return (e - z).detach() + z, codes, 0.25 * (z - e).square().mean(), torch.exp(-(p * torch.log(p + 1e-10)).sum()), new


def vqvae_forward(w, clip, downsample, train=False):
    "(recon, losses, codes, new buffers) of one forward pass."
    stats = {}
    z = convolve(w, "pre_vq_conv.conv", encoder(w, clip, downsample, train, stats))
    quantised, codes, commitment, perplexity, new = codebook_forward(w, z, train)
    recon = decoder(w, convolve(w, "post_vq_conv.conv", quantised), downsample, train, stats)
    losses = {"recon_loss": (recon - clip).square().mean() / 0.06, "commitment_loss": commitment, "perplexity": perplexity}
    return recon, losses, codes, stats | new


# ---- the GPT
def channel_norm(w, name, x):  # nn.LayerNorm over the channels of (B,C,T,H,W)
    x = x.movedim(1, -1)
    x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
    return (x * w[f"{name}.norm.norm.weight"] + w[f"{name}.norm.norm.bias"]).movedim(-1, 1)


def resnet(w, frames):  # (B,3,n,H,W) -> (B,n,H/4,W/4,C)
    def conv(name, x, stride=(1, 1, 1)):
        kernel = w[f"{name}.weight"]
        return F.conv3d(x, kernel, None, stride, padding=kernel.shape[-1] // 2)
    x = F.relu(channel_norm(w, "resnet.stem.1", conv("resnet.stem.0", frames)))
    for group in range(1, 5):
        for k in itertools.count():
            name = f"resnet.group{group}." + (f"blocks.{k - 1}" if k else "start_block")
            if f"{name}.conv1.weight" not in w: break
            stride = (1, 2, 2) if group in (2, 3) and not k else (1, 1, 1)
            shortcut = x if k else channel_norm(w, f"{name}.proj_bnr", conv(f"{name}.proj_conv", x, stride))
            y = F.relu(channel_norm(w, f"{name}.bnr1", conv(f"{name}.conv1", x, stride)))
            y = F.relu(channel_norm(w, f"{name}.bnr2", conv(f"{name}.conv2", y)))
            x = F.relu(shortcut + y)
    return x.movedim(1, -1)


def positions(w, name):  # (T,H,W,C): a third of the channels for each axis
    parts = [w[f"{name}.emb.d_{axis}"] for axis in range(3)]
    out = torch.empty(*(len(part) for part in parts), 3 * parts[0].shape[1])
    for t, h, x in itertools.product(*(range(len(part)) for part in parts)):
        out[t, h, x] = torch.cat([parts[0][t], parts[1][h], parts[2][x]])
    return out


def layer_norm(w, name, x, label):  # label: one-hot (B, n_classes) or None
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    x = (x - mean) * (1e-5 + var.rsqrt())
    if label is None: return x * w[f"{name}.g"] + w[f"{name}.b"]
    return x * (1 + label @ w[f"{name}.w.weight"].T)[:, None] + (label @ w[f"{name}.wb.weight"].T)[:, None]


def attention(w, name, x, source, heads, seen=None):
    q, k, v = x @ w[f"{name}.w_qs.weight"].T, source @ w[f"{name}.w_ks.weight"].T, source @ w[f"{name}.w_vs.weight"].T
    return softmax_attention(q, k, v, heads, seen) @ w[f"{name}.fc.weight"].T + w[f"{name}.fc.bias"]


def sparse_layout(shape):
    "bool (blocks, blocks), block by block as the words say: 4 blocks before and itself, or the same place at a lower index of one leading axis."
    product, axis = 1, 3
    while axis > 0:
        axis -= 1
        product *= shape[axis]
        if product > 32: break
    assert product % 32 == 0
    grid = (*shape[:axis], product // 32)
    cells = list(itertools.product(*(range(n) for n in grid)))
    layout = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for r, row in enumerate(cells):
        for c, column in enumerate(cells):
            other = [i for i in range(len(grid)) if row[i] != column[i]]
            same_place = len(other) == 1 and other[0] != len(grid) - 1 and column[other[0]] < row[other[0]]
            layout[r, c] = c <= r and (r - 4 <= c or same_place)
    return layout


def seen_keys(attn_type, shape):
    size = math.prod(shape)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    if attn_type == "full": return causal
    return causal & sparse_layout(shape).repeat_interleave(32, 0).repeat_interleave(32, 1)


def gpt_hidden(w, case, codes, frames=None, labels=None):
    "Stream after each block and after the final norm, each (B,S,H); `frames` (B,3,n,H,W), `labels` (B,)."
    label = None if labels is None else F.one_hot(labels, case.classes).float()
    cond = None
    if frames is not None: cond = (resnet(w, frames) + positions(w, "cond_pos_embd")).flatten(1, 3)
    x = w["vqvae.codebook.embeddings"][codes.flatten(1)] @ w["fc_in.weight"].T
    x = torch.cat([w["attn_stack.right_shift.sos"].expand(len(x), 1, -1), x[:, :-1]], 1)
    x = x + positions(w, "attn_stack.pos_embd").flatten(0, 2)
    seen, states = seen_keys(case.attn_type, case.latent), []
    for i in range(case.layers):
        block = f"attn_stack.attn_nets.{i}"
        y = layer_norm(w, f"{block}.pre_attn_norm", x, label)
        x = x + attention(w, f"{block}.attn", y, y, case.heads, seen)
        if cond is not None:
            x = x + attention(w, f"{block}.enc_attn", layer_norm(w, f"{block}.pre_enc_norm", x, label), cond, case.heads)
        y = layer_norm(w, f"{block}.pre_fc_norm", x, label) @ w[f"{block}.fc_block.0.weight"].T + w[f"{block}.fc_block.0.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ w[f"{block}.fc_block.2.weight"].T + w[f"{block}.fc_block.2.bias"]
        states.append(x)
    return states + [layer_norm(w, "norm", x, label)]


def gpt_logits(w, case, codes, frames=None, labels=None):  # (B,S,K)
    return gpt_hidden(w, case, codes, frames, labels)[-1] @ w["fc_out.weight"].T


# ---- files
def arguments(case, **changes):
    "The command line that a GPT's checkpoint carries."
    given = dict(vqvae="bair_stride4x2x2", n_cond_frames=case.cond_frames, class_cond=bool(case.classes), class_cond_dim=case.classes or None,
                 hidden_dim=case.hidden, heads=case.heads, layers=case.layers, dropout=0.2, attn_type=case.attn_type, attn_dropout=0.3,
                 data_path="/gone/bair.hdf5", sequence_length=case.length, resolution=case.resolution, batch_size=8, num_workers=8,
                 gpus=8, max_steps=100_000, sync_batchnorm=False, amp_backend="native", precision=16, logger=True, lr=3e-4)
    return argparse.Namespace(**(given | changes))


def vqvae_arguments(case, **changes):
    given = dict(embedding_dim=case.dim, n_codes=case.codes, n_hiddens=case.hiddens, n_res_layers=case.res_layers,
                 downsample=case.downsample, sequence_length=case.length, resolution=case.resolution, gpus=2, data_path="/gone")
    return argparse.Namespace(**(given | changes))


def write_checkpoint(path, weights, args, weights_only=False, amp=False, optimizer=True, legacy=False):
    "A file as Lightning 1.3.3 writes it: callbacks keyed by a Lightning class, optimizer state twice the size of the model."
    name = "pytorch_lightning.callbacks.model_checkpoint"
    stand_in = {part: types.ModuleType(part) for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name)}
    kind = stand_in[name].ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    content = {"epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.3.3", "state_dict": weights}
    if not weights_only:
        moments = {i: {"step": 1000, "exp_avg": x.clone().float(), "exp_avg_sq": x.clone().float()}
                   for i, x in enumerate(weights.values())} if optimizer else {}
        content["callbacks"] = {kind: {"monitor": "val/loss", "best_model_score": torch.tensor(1.5), "best_model_path": "/gone/best.ckpt"}}
        content["optimizer_states"] = [{"state": moments, "param_groups": [{"lr": 3e-4, "params": list(moments)}]}]
        content["lr_schedulers"] = [{"T_max": 100_000, "_last_lr": [3e-4]}]
        if amp: content["native_amp_scaling_state"] = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 5}
    content |= {"hparams_name": "kwargs", "hyper_parameters": {"args": args}}
    sys.modules.update(stand_in)
    try: torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        for part in stand_in: del sys.modules[part]
    return path
