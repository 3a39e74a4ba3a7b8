"""Stage 3: the UNet and the text encoder together, on cached latents.

``python -m training.denoiser`` trains from scratch at a steady learning rate, then goes on from
the averaged weights while the rate falls to zero; ``python -m training.denoiser anneal`` does the
second part alone. Every 250 steps ``.runs/denoiser/checkpoint.pt`` gets the averaged weights.
"""

import random
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from training.optimiser import Average, Optimisers, learning_rate
from training.paths import RUNS
from training.shards import NOTHING, SHARDS, latents_file, load_labels
from training.text import LENGTH, build_encoder, build_tokenizer
from training.vocabulary import COLOURS, OBJECTS, caption

STEADY_STEPS, ANNEAL_STEPS = 1250, 1450
BATCH = 48
PEAK = 4e-3
DROPPED_CAPTIONS = 0.1
EVERY = 250
CHECKPOINT = RUNS / "denoiser" / "checkpoint.pt"

NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
}


def build_unet() -> UNet2DConditionModel:
    """The untrained UNet: 4 x 16 x 16 latents, attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=128,
    )


class TextToNoise(nn.Module):
    """The UNet and its text encoder as one module, so that one optimiser and one average hold both."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text = build_encoder(tokenizer)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """Noise (n, 4, 16, 16) predicted from ``noisy`` at ``timesteps`` (n,) and ``tokens`` (n, 77)."""
        states = self.text(tokens).last_hidden_state
        noise: Tensor = self.unet(noisy, timesteps, states).sample
        return noise


class Dataset:
    """Random batches of latents with freshly written captions, with or without mirrored pictures."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int, mirrored: bool) -> None:
        self._mirrored = mirrored
        self._tokenizer = tokenizer
        self._chance = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._shards = 0
        self.grow()

    def grow(self) -> None:
        """Take in every shard whose latents are there."""
        found = [shard for shard in range(SHARDS) if latents_file(shard).exists()]
        if len(found) == self._shards:
            return
        labels = [load_labels(shard) for shard in found]
        latents = np.concatenate([np.load(latents_file(shard)) for shard in found])
        kept = np.concatenate([self._mirrored | ~label.mirrored for label in labels])
        self._latents = torch.from_numpy(latents[kept])
        self._objects = np.concatenate([label.objects for label in labels])[kept]
        self._colours = np.concatenate([label.colours for label in labels])[kept]
        self._sizes = np.concatenate([label.sizes for label in labels])[kept]
        self._shards = len(found)
        print(f"{len(self._latents)} pictures in {self._shards} shards", flush=True)

    def _caption(self, index: int) -> str:
        if self._chance.random() < DROPPED_CAPTIONS:
            return ""
        which = int(self._objects[index])
        name = None if which == NOTHING else list(OBJECTS)[which]
        colour = list(COLOURS)[int(self._colours[index])]
        return caption(name, colour, float(self._sizes[index]), self._chance)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless pairs: latents (size, 4, 16, 16) and tokens (size, 77), in shuffled epochs."""
        while True:
            self.grow()
            order = torch.randperm(len(self._latents), generator=self._generator)
            for chosen in order[: len(order) // size * size].view(-1, size):
                captions = [self._caption(int(index)) for index in chosen]
                tokens = self._tokenizer(
                    captions, padding="max_length", max_length=LENGTH, truncation=True,
                    return_tensors="pt",
                ).input_ids  # fmt: skip
                yield self._latents[chosen].float(), tokens


def timestep_odds(cumulative_alphas: Tensor, gamma: float = 5.0) -> Tensor:
    """How often each timestep is drawn: min-SNR(5) weights as odds, a sixth of them uniform."""
    ratio = cumulative_alphas / (1 - cumulative_alphas)
    weights = ratio.clamp(max=gamma) / ratio
    return 5 / 6 * weights / weights.sum() + 1 / 6 / len(weights)


def train(model: TextToNoise, tokenizer: CLIPTokenizer, steps: int, hold: float, mirrored: bool, seed: int) -> None:
    """Train ``model`` for ``steps``; the learning rate is at its peak for a share ``hold`` of them."""
    torch.manual_seed(seed)
    optimisers, average = Optimisers(model, muon=1.25), Average(model, 0.998)
    schedule = DDPMScheduler(**NOISE_SCHEDULE)
    odds = timestep_odds(schedule.alphas_cumprod)
    start, losses = time.time(), 0.0
    batches = Dataset(tokenizer, seed, mirrored).batches(BATCH)
    for step in range(1, steps + 1):
        latents, tokens = next(batches)
        noise = torch.randn_like(latents)
        timesteps = torch.multinomial(odds, BATCH, replacement=True)
        noisy = schedule.add_noise(latents, noise, timesteps)
        # The flash kernel's backward pass is slow for such small heads.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                predicted = model(noisy, timesteps, tokens)
            loss = F.mse_loss(predicted.float(), noise)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers.step(learning_rate(step - 1, steps, PEAK, warmup=100, hold=hold))
        average.update()
        losses += loss.item()
        if step % 50 == 0:
            spent = time.time() - start
            print(f"unet {step}/{steps} loss {losses / 50:.4f} {spent:.0f}s", flush=True)
            losses = 0.0
        if step % EVERY == 0 or step == steps:
            torch.save(average.weights, CHECKPOINT.with_suffix(".partial"))
            CHECKPOINT.with_suffix(".partial").rename(CHECKPOINT)


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    tokenizer = build_tokenizer(RUNS / "denoiser" / "tokenizer")
    model = TextToNoise(tokenizer)
    if sys.argv[1:] != ["anneal"]:
        train(model, tokenizer, STEADY_STEPS, hold=1.0, mirrored=True, seed=3)
    model.load_state_dict(torch.load(CHECKPOINT))
    train(model, tokenizer, ANNEAL_STEPS, hold=0.0, mirrored=False, seed=4)


if __name__ == "__main__":
    main()
