"""`hyimg make-tiny-model`: writes the four model files in miniature, with random weights and the real tensor names.

They replace the real ones in dry runs and tests.
"""

from __future__ import annotations

from hyimg.checkpoints.model_files import ModelFolder
from hyimg.config.tools import MakeTinyModelConfig
from hyimg.errors import HyimgError
from hyimg.report import Reporter, size_text

# Typical captions, to train the tokenizer on
_TOKENIZER_TEXTS = (
    "a photo of a cat looking at the camera, close portrait, soft light, blurred background",
    "a portrait of a woman in an orange suit standing in front of a flag, studio photograph",
    "a cup of coffee with a spoon on a wooden table in the morning, warm light from a window",
    "a white rocket on its launch pad at night, lit from below, long exposure",
    "hundreds of galaxies and stars on a black sky, astronomy, high detail",
    'a shop sign that says "OPEN" above the door of a bakery in a narrow street',
    'a scanned page of a book with the heading "Chapter one" in large letters',
    "an old house by the sea, painting in oil, thick brush strokes, muted colours",
    "a dog running on a beach with a red ball, water splashing, bright summer day",
    "a bowl of fruit with apples, pears and grapes, still life, dark background",
    "a city skyline at dusk with lights reflected in the river, wide angle",
    "masterpiece, best quality, highly detailed, sharp focus, natural colours, 35mm film",
    "一只猫坐在窗边看着外面的雨,柔和的光线",
    "海边的日落,金色的云,油画风格",
    "写着“欢迎光临”的招牌",
)


def make_tiny_model(config: MakeTinyModelConfig, report: Reporter) -> ModelFolder:
    """Writes the folder, with a newly trained tokenizer next to the text encoder.

    Raises HyimgError if model files exist already (unless `overwrite`), since they may be real ones.
    """
    options = config.tiny
    folder = ModelFolder(options.directory)
    there = [path for path in (*folder.files().values(), folder.tokenizer) if path.exists()]
    if there and not options.overwrite:
        raise HyimgError(f"`{there[0]}` exists", hint="choose another folder, or give `--overwrite`")
    _write(folder, depth=options.depth, seed=options.seed)
    for option, path in folder.files().items():
        report.note(f"--{option} {path} ({size_text(path.stat().st_size)})")
    report.note(f"tokenizer, found automatically: {folder.tokenizer}")
    return folder


def _write(folder: ModelFolder, *, depth: str, seed: int) -> None:
    import torch
    from safetensors.torch import save

    from hyimg.cache.atomic import atomic_write_bytes
    from hyimg.checkpoints.architecture import DIT_TINY, DIT_TINY_FULL, VAE_TINY
    from hyimg.checkpoints.safetensors_file import read_header
    from hyimg.encoders.tiny import make_tiny_byt5, make_tiny_qwen, train_tiny_tokenizer
    from hyimg.model.dit import DiT
    from hyimg.model.loading import init_random
    from hyimg.model.vae import VAE

    dit = DiT(DIT_TINY_FULL if depth == "full" else DIT_TINY)
    vae = VAE(VAE_TINY)
    # the real files' dtypes: bf16 for the DiT, fp16 for the VAE
    for path, model, dtype in ((folder.dit, dit, torch.bfloat16), (folder.vae, vae, torch.float16)):
        init_random(model, seed)
        state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
        atomic_write_bytes(path, save(state), root=folder.directory, verify=read_header)
    make_tiny_qwen(folder.text_encoder, seed=seed)
    make_tiny_byt5(folder.byt5, seed=seed)
    train_tiny_tokenizer(_TOKENIZER_TEXTS, folder.directory)
