"""Time and memory of loading, beside from_pretrained of diffusers, on the same files in one run.

    python tests/load_bench.py            a 1 GB random transformer in the hub layout, and weights/tiny

Each measurement is a process of its own, so each has its own peak. The clock starts after the imports. The files are in
the page cache for both sides. `anonymous` is memory that the process allocates: a copy of the weights shows there.
`peak` is the highest resident size, with the mapped pages of the file.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MEASURE = """
import json, re, sys, time
import torch
{imports}
status = lambda key: int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
anonymous = status("RssAnon")
began = time.perf_counter()
model = {load}
loaded = time.perf_counter() - began
total = sum(p.detach().float().sum().item() for p in model.parameters())
print(json.dumps(dict(seconds=loaded, with_reading=time.perf_counter() - began,
                      anonymous=status("RssAnon") - anonymous, peak=status("VmHWM"))))
"""
OURS = "from kontext_min.checkpoints import load_flux, load_autoencoder"
THEIRS = "from diffusers import FluxTransformer2DModel, AutoencoderKL"


def measure(imports: str, load: str) -> dict[str, float]:
    code = MEASURE.format(imports=imports, load=load)
    runs = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    return min(runs, key=lambda r: r["seconds"])


def main() -> None:
    import torch

    sys.path.insert(0, str(ROOT))
    from safetensors.torch import save_file

    from kontext_min.extras.saving import save_flux
    from kontext_min.flux import Flux, FluxParams

    with tempfile.TemporaryDirectory() as folder:
        hub, bfl = Path(folder) / "hub" / "transformer", Path(folder) / "bfl.safetensors"
        params = FluxParams(hidden_size=1536, num_heads=12, depth=3, depth_single_blocks=7)
        torch.set_default_dtype(torch.bfloat16)
        model = Flux(params)
        torch.set_default_dtype(torch.float32)
        save_flux(model, hub)
        save_file(model.state_dict(), bfl)
        size = (hub / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
        del model
        rows = [
            (f"transformer, {size:.0f} MB, hub names: diffusers", THEIRS,
             f"FluxTransformer2DModel.from_pretrained({str(hub)!r}, torch_dtype=torch.bfloat16)"),
            ("  ours, the same file", OURS, f"load_flux({str(hub)!r})"),
            ("  ours, BFL names", OURS, f"load_flux({str(bfl)!r})"),
            ("the same: diffusers without accelerate", THEIRS,
             f"FluxTransformer2DModel.from_pretrained({str(hub)!r}, torch_dtype=torch.bfloat16,"
             " low_cpu_mem_usage=False)"),
            ("  ours", OURS, f"load_flux({str(hub)!r})"),
            ("the same, as float32: diffusers", THEIRS, f"FluxTransformer2DModel.from_pretrained({str(hub)!r})"),
            ("  ours", OURS, f"load_flux({str(hub)!r}, dtype=torch.float32)"),
            ("weights/tiny transformer: diffusers", THEIRS,
             "FluxTransformer2DModel.from_pretrained('weights/tiny', subfolder='transformer')"),
            ("  ours", OURS, "load_flux('weights/tiny', dtype=torch.float32)"),
            ("weights/tiny autoencoder: diffusers", THEIRS,
             "AutoencoderKL.from_pretrained('weights/tiny', subfolder='vae')"),
            ("  ours", OURS, "load_autoencoder('weights/tiny', dtype=torch.float32)"),
        ]  # fmt: skip
        print(f"{'':52} {'load s':>8} {'ratio':>6} {'+ read s':>9} {'anonymous MB':>13} {'peak MB':>8}")
        reference = None
        for name, imports, load in rows:
            m = measure(imports, load)
            reference = m if "diffusers" in name else reference
            ratio = m["seconds"] / reference["seconds"]
            print(
                f"{name:52} {m['seconds']:8.3f} {ratio:6.2f} {m['with_reading']:9.2f} {m['anonymous']:13.0f}"
                f" {m['peak']:8.0f}"
            )


if __name__ == "__main__":
    main()
