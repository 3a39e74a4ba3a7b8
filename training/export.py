"""Stage 5: put the trained parts together as a Stable Diffusion folder of half-precision weights.

``python -m training.export [folder]`` can run at any moment: it takes the newest checkpoint.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from training.denoiser import CHECKPOINT, NOISE_SCHEDULE, TextToNoise
from training.paths import PIPELINE, RUNS


def build_pipeline() -> StableDiffusionPipeline:
    """The pipeline of the newest weights, in full precision."""
    tokenizer = CLIPTokenizer.from_pretrained(RUNS / "denoiser" / "tokenizer")
    model = TextToNoise(tokenizer)
    model.load_state_dict(torch.load(CHECKPOINT))
    refined = RUNS / "vae-refined"
    vae = AutoencoderKL.from_pretrained(refined if refined.exists() else RUNS / "vae")
    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text.eval(),
        tokenizer=tokenizer,
        unet=model.unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(folder: Path = PIPELINE) -> None:
    """Write the pipeline to ``folder`` with float16 safetensors."""
    pipeline = build_pipeline().to(torch.float16)
    if folder.exists():
        shutil.rmtree(folder)
    pipeline.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # for readers of the older tokenizer format
        shutil.copy(RUNS / "denoiser" / "tokenizer" / name, folder / "tokenizer" / name)
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a path of the machine that trained
        if "dtype" in config:  # transformers would compute in the stored precision, diffusers in float32
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    export(Path(sys.argv[1]) if len(sys.argv) > 1 else PIPELINE)
