"""Stage 4: the decoder alone, on cached latents, for sharper pictures.

The encoder stays as it is, so cached latents and the denoiser remain valid, and this can run
beside the denoiser. ``python -m training.refine`` writes ``.runs/vae-refined`` every 250 steps.
"""

import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.optimiser import Average, Optimisers, learning_rate
from training.paths import RUNS
from training.shards import GENERAL, SHARDS, latents_file, load_pictures
from training.vae import SCALING, picture_loss, to_tensor

STEPS, BATCH, PEAK = 1500, 4, 2e-3
NOISE = 0.03
EVERY = 250


class Examples:
    """Random latents and the pictures they stand for; one in four is of the general shard."""

    def __init__(self, seed: int) -> None:
        self._chance = np.random.default_rng(seed)
        shards = [s for s in (*range(SHARDS), GENERAL) if latents_file(s).exists()]
        self._latents = {s: np.load(latents_file(s), mmap_mode="r") for s in shards}
        self._pictures = {s: load_pictures(s) for s in shards}
        self._own = [s for s in shards if s != GENERAL]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Latents (size, 4, 16, 16) in the decoder's scale, pictures (size, 3, 128, 128) in -1..1."""
        latents, pictures = [], []
        for i in range(size):
            general = i == 0 and GENERAL in self._latents
            shard = GENERAL if general else int(self._chance.choice(self._own))
            index = int(self._chance.integers(len(self._latents[shard])))
            latents.append(torch.from_numpy(np.array(self._latents[shard][index])))
            pictures.append(torch.from_numpy(np.array(self._pictures[shard][index])))
        return torch.stack(latents).float() / SCALING, to_tensor(torch.stack(pictures))


def refine(steps: int = STEPS, seed: int = 4) -> None:
    """Train the decoder and the convolution before it."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(RUNS / "vae").to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    assert vae.quant_conv is not None
    vae.quant_conv.requires_grad_(False)
    optimisers, average = Optimisers(vae, muon=1.0), Average(vae, 0.995)
    examples, start, losses = Examples(seed), time.time(), 0.0
    for step in range(1, steps + 1):
        latents, wanted = examples.batch(BATCH)
        latents = latents + NOISE / SCALING * torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            made = vae.decode(latents).sample
        loss = picture_loss(made.float(), wanted.contiguous(memory_format=torch.channels_last))
        torch.autograd.backward(loss)
        optimisers.step(learning_rate(step - 1, steps, PEAK, hold=0.1))
        average.update()
        losses += loss.item()
        if step % 100 == 0:
            spent = time.time() - start
            print(f"refine {step}/{steps} loss {losses / 100:.4f} {spent:.0f}s", flush=True)
            losses = 0.0
        if step % EVERY == 0 or step == steps:
            current = {name: value.clone() for name, value in vae.state_dict().items()}
            vae.load_state_dict(average.weights)
            vae.save_pretrained(RUNS / "vae-refined")
            vae.load_state_dict(current)


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    refine()


if __name__ == "__main__":
    main()
