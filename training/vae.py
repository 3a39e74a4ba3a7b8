"""Stage 1: the autoencoder, 128 x 128 pixels to 4 x 16 x 16 latents.

``python -m training.vae`` trains it into ``.runs/vae``; its decoder is later refined alone.
"""

import time

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.data import all_labels, fetch, load_sprites, random_pictures
from training.optimiser import Average, Optimisers, learning_rate
from training.paths import RUNS

SCALING = 0.18215


def build() -> AutoencoderKL:
    """The untrained autoencoder. Two norm groups: with more, its colours stall."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 96, 128),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=128,
        scaling_factor=SCALING,
    )


def to_tensor(pixels: Tensor) -> Tensor:
    """uint8 pixels (n, h, w, 3) to floats (n, 3, h, w) in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 on pixels and on their horizontal and vertical differences."""
    error = made - wanted
    return error.abs().mean() + 0.7 * error.diff(dim=-1).abs().mean() + 0.7 * error.diff(dim=-2).abs().mean()


def crop(pictures: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random square of side ``size`` from pictures (n, 3, h, w)."""
    room = pictures.size(-1) - size + 1
    top, left = (int(torch.randint(room, (1,), generator=generator)) for _ in range(2))
    return pictures[:, :, top : top + size, left : left + size]


def train_stage(
    vae: AutoencoderKL, size: int, steps: int, batch: int, peak: float, kl_weight: float,
    noise: float, seed: int, average: Average | None, hold: float,
) -> None:  # fmt: skip
    """Train on ``size``-pixel crops; ``noise`` is added to latents, relative to their spread."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pictures = random_pictures(load_sprites(all_labels()), seed)
    optimisers = Optimisers(vae, muon=1.0)
    start = time.time()
    for step in range(steps):
        pixels = torch.stack([torch.from_numpy(next(pictures).pixels) for _ in range(batch)])
        wanted = crop(to_tensor(pixels), size, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(wanted).latent_dist
            latents = posterior.sample()
            if noise:
                latents = latents + noise * latents.detach().std() * torch.randn_like(latents)
            made = vae.decode(latents).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = picture_loss(made.float(), wanted)
        torch.autograd.backward(loss + kl_weight * kl)
        optimisers.step(learning_rate(step, steps, peak, hold=hold))
        if average:
            average.update()
        if step % 25 == 0:
            spent = time.time() - start
            print(f"vae {size}px {step}/{steps} loss {loss:.4f} kl {kl:.2f} {spent:.0f}s", flush=True)


@torch.no_grad()
def whiten(vae: AutoencoderKL, samples: int = 512) -> None:
    """Bake a whitening into both quant convolutions: latents times ``SCALING`` get unit covariance.

    The encoder's mean becomes ``W (mean - mu) / SCALING``; the decoder undoes it first. The
    log-variance is made small, so that sampling and taking the mode agree.
    """
    pictures = random_pictures(load_sprites(all_labels()), 77)
    means = []
    for _ in range(samples // 32):
        pixels = torch.stack([torch.from_numpy(next(pictures).pixels) for _ in range(32)])
        means.append(vae.encode(to_tensor(pixels)).latent_dist.mean)
    flat = torch.cat(means).permute(1, 0, 2, 3).flatten(1)
    mu = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T / SCALING
    backward = torch.linalg.inv(forward)
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into is not None and out is not None
    weight, bias = into.weight[:4, :, 0, 0], into.bias[:4]
    into.weight[:4, :, 0, 0] = forward @ weight
    into.bias[:4] = forward @ (bias - mu)
    into.weight[4:] = 0
    into.bias[4:] = -8
    old = out.weight[:, :, 0, 0].clone()
    out.weight[:, :, 0, 0] = old @ backward
    out.bias += old @ mu


def train() -> None:
    """Both stages and the whitening; writes ``.runs/vae``."""
    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    train_stage(vae, 64, 1350, 8, 6e-3, 5e-4, 0.0, 1, None, hold=1.0)
    average = Average(vae, 0.98)
    train_stage(vae, 128, 1250, 5, 4e-3, 3e-4, 0.05, 2, average, hold=0.2)
    vae.load_state_dict(average.weights)
    whiten(vae)
    vae.save_pretrained(RUNS / "vae")


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    fetch()
    train()


if __name__ == "__main__":
    main()
