"""Train the zoo's VisionTransformer on CIFAR-10 from scratch: about an hour on one CPU core.

    python benchmarks/zoo/vit_cifar10.py --data FOLDER --output FOLDER [--epochs 18]

The result is a directory in timm's own layout, which every optin command opens. The same command goes on
where an interrupted run stopped; --epochs may then move the end of the schedule. README.md is the model card.
"""

from __future__ import annotations

import timm
import torch
from cifar10 import CLASSES, Recipe, cifar_parser, normalised, train_and_export
from timm.layers import PatchDropout, build_sincos2d_pos_embed, set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = "vit_tiny_patch16_224"  # the name gives width 192; the arguments give the rest
MODEL_ARGS = {
    "img_size": 32,
    "patch_size": 4,
    "depth": 9,
    "num_heads": 6,
    "class_token": False,
    "global_pool": "avg",
}


def dropped_patches(progress: float) -> float:
    """The share of patches a step leaves out: half of them cost less than half the time; the end sees all."""
    return 0.5 if progress < 0.78 else 0.25 if progress < 0.89 else 0.0


def new_model(images: Tensor) -> nn.Module:
    """A VisionTransformer whose patch embedding whitens the patches of `images` (n, 3, 32, 32).

    Raw patches differ mostly in brightness, and positions mean nothing until they are learned: whitening
    and a sine grid spare the optimiser both.
    """
    model = timm.create_model(ARCHITECTURE, num_classes=CLASSES, **MODEL_ARGS)
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=0)
    size, width = model.patch_embed.patch_size[0], model.embed_dim
    patches = F.unfold(normalised(images), size, stride=size).transpose(1, 2).flatten(0, 1)  # (n * 64, 48)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    spread = torch.linalg.qr(torch.randn(width, len(values)))[0]  # (192, 48), orthonormal columns
    whitening = spread @ torch.diag((values + 1e-2).rsqrt()) @ vectors.T
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(whitening.view_as(model.patch_embed.proj.weight))
        model.pos_embed.copy_(build_sincos2d_pos_embed(model.patch_embed.grid_size, width, temperature=100))
    return model


def new_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, because it learns much faster per epoch; AdamW for everything else."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    weights = [model.patch_embed.proj.weight, model.head.weight]
    taken = {id(p) for p in (*matrices, *weights)}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), fused=True),
    ]


def drop_patches(model: nn.Module, progress: float) -> None:
    model.patch_drop.prob = dropped_patches(progress)


def main() -> None:
    settings = cifar_parser(__doc__.splitlines()[0]).parse_args()
    # on a CPU the fused attention's backward takes half of the time
    set_fused_attn(torch.device(settings.device).type != "cpu")
    recipe = Recipe(
        ARCHITECTURE,
        MODEL_ARGS,
        new_model,
        new_optimizers,
        epochs=18,
        before_step=drop_patches,
        config={"fixed_input_size": True},
    )
    train_and_export(recipe, settings)


if __name__ == "__main__":
    main()
