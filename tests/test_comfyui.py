"""docs/comfyui: the node gives what restore_latent gives; the workflows name nodes, sockets and values that exist.

ComfyUI itself is not installed here. Small stand-ins take its place: a model that returns x - sigma flux(x, sigma), and
a sampler that starts at sigma noise + (1 - sigma) latent (comfy/samplers.py KSAMPLER, comfy/model_sampling.py CONST,
comfy/latent_formats.py, at 9d8a8179).
"""

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kontext_min.checkpoints import load_autoencoder, load_flux
from kontext_min.data import to_tensor
from kontext_min.extras import lora_files
from kontext_min.flow import Objective, Prompt, pack, token_ids, unpack
from kontext_min.lora import add_lora
from kontext_min.restore import restore_latent

ROOT = Path(__file__).parent.parent
TINY, FOLDER = ROOT / "weights" / "tiny", ROOT / "docs" / "comfyui"
NODE = FOLDER / "kontext_min_bridge.py"
SIZE = (90, 74)  # no multiple of 16; padded to multiples of 16 it is also one of 8, the token of weights/tiny
ABOUT = {"objective": "bridge", "prompt": "Restore this (old) photo.", "guidance": 1.5}
PLAIN = {"context": False, "source_noise": 0.0, "start_time": 1.0}
CASES = [  # what was trained; solver, evaluations, strength
    ({}, "euler", 1, 1.0),
    ({}, "euler", 4, 1.0),
    ({}, "midpoint", 2, 1.0),
    ({}, "midpoint", 3, 1.0),  # two steps, as in sample.py
    ({}, "midpoint", 8, 1.0),
    ({}, "midpoint", 4, 0.4),
    ({"context": True}, "euler", 2, 1.0),
    ({"context": True}, "midpoint", 4, 1.0),
    ({"source_noise": 0.2}, "euler", 4, 1.0),
    ({"source_noise": 0.2}, "midpoint", 4, 0.6),
    ({"start_time": 0.5}, "euler", 4, 1.0),
    ({"start_time": 0.3}, "midpoint", 4, 1.0),
    ({"context": True, "source_noise": 0.1, "start_time": 0.7}, "midpoint", 4, 0.8),
]


def write_lora(path, **about):
    """A LoRA for weights/tiny on a model, and in a file with such a header."""
    flux, generator = load_flux(TINY, dtype=torch.float32), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in add_lora(flux, 4, 4):
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    lora_files.save_lora(flux, path, metadata={"kontext_min": json.dumps(about)})
    return flux


class Sampler:
    """As KSAMPLER samples with CONST, without masks and previews."""

    def __init__(self, function, options):
        self.function, self.options = function, options

    def sample(self, model, sigmas, noise, latent, seen):
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent
        x = self.function(model, x, sigmas, extra_args={"seed": 7}, callback=seen.append, disable=True, **self.options)
        return x / (1 - sigmas[-1])


class Model:
    """A ModelPatcher and its .model: weights/tiny, whose autoencoder has other factors than Flux's."""

    def __init__(self, autoencoder, flux=None):
        self.model, self.flux, self.evaluations = self, flux, 0
        self.scale, self.shift = autoencoder.params.scale_factor, autoencoder.params.shift_factor

    def process_latent_in(self, latent):
        return (latent - self.shift) * self.scale

    def with_conditioning(self, prompt, guidance, reference):
        """What a guider passes to the sampler: x, sigma -> denoised."""

        @torch.no_grad()
        def denoise(x, sigma, seed):
            assert sigma.shape == (len(x),) and seed == 7
            self.evaluations += 1
            h, w = x.shape[-2:]
            img, ids = pack(x), token_ids(h, w)
            if reference is not None:  # ComfyUI's method "offset": index 1, rows and columns from 0
                img = torch.cat([img, pack(self.process_latent_in(reference["samples"]))], dim=1)
                ids = torch.cat([ids, token_ids(h, w, index=1)], dim=1)
            txt_ids = torch.zeros(1, prompt.txt.shape[1], 3)
            out = self.flux(img, ids, prompt.txt, txt_ids, sigma, prompt.y, torch.tensor([guidance]))
            return x - sigma[:, None, None, None] * unpack(out[:, : h * w // 4], h, w)

        return denoise


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """The names of ComfyUI that the node uses."""
    loaded = []

    class Loader:
        def load_lora_model_only(self, model, lora_name, strength_model):
            loaded.append((lora_name, strength_model))
            model.flux = load_flux(TINY, dtype=torch.float32)
            lora_files.load_lora(model.flux, tmp_path / lora_name, strength_model)
            return (model,)

    names = {
        "folder_paths": {
            "get_filename_list": lambda kind: {"loras": sorted(p.name for p in tmp_path.iterdir())}[kind],
            "get_full_path_or_raise": lambda kind, name: str(tmp_path / name),
        },
        "nodes": {"LoraLoaderModelOnly": Loader},
        "comfy": {},
        "comfy.samplers": {"KSAMPLER": Sampler},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    node = runpy.run_path(str(NODE))["NODE_CLASS_MAPPINGS"]["KontextMinBridge"]
    autoencoder = load_autoencoder(TINY, dtype=torch.float32)

    def encode(pixels):  # (B, H, W, 3) in [0, 1] -> latents as the network of the autoencoder gives them
        with torch.no_grad():
            mean = autoencoder.encode(2 * pixels.movedim(-1, 1) - 1)
        return mean / autoencoder.params.scale_factor + autoencoder.params.shift_factor

    return SimpleNamespace(node=node, loaded=loaded, autoencoder=autoencoder, vae=SimpleNamespace(encode=encode))


def photo():
    image = Image.open(ROOT / "tests" / "photos" / "bowl.jpg").convert("RGB").resize(SIZE)
    return to_tensor(image)[None], torch.from_numpy(np.asarray(image).copy())[None].float() / 255


@pytest.mark.parametrize(("trained", "solver", "evaluations", "strength"), CASES)
def test_the_node_restores_as_restore_latent_does(comfyui, tmp_path, trained, solver, evaluations, strength):
    flux = write_lora(tmp_path / "a.safetensors", **ABOUT, **PLAIN | trained)
    ours, theirs = photo()
    generator = torch.Generator().manual_seed(0)
    txt, y = torch.randn(1, 8, 96, generator=generator), torch.randn(1, 64, generator=generator)
    prompt, objective = Prompt(txt, y, torch.tensor([ABOUT["guidance"]])), Objective(**PLAIN | trained)
    z = restore_latent(
        ours, flux, comfyui.autoencoder, prompt, objective, evaluations, solver, seed=7, strength=strength
    )

    model = Model(comfyui.autoencoder)
    outputs = comfyui.node().build(model, comfyui.vae, theirs, "a.safetensors", evaluations, solver, strength, 7)
    out = dict(zip(comfyui.node.RETURN_NAMES, outputs, strict=True))
    assert comfyui.loaded == [("a.safetensors", 1.0)]
    assert out["noise"].seed == 7 and (out["width"], out["height"]) == SIZE
    assert out["prompt"] == r"Restore this \(old\) photo." and out["guidance"] == ABOUT["guidance"]
    assert (out["reference"] is not None) == bool(trained.get("context"))
    seen, latent = [], model.process_latent_in(out["latent"]["samples"])
    denoise = out["model"].with_conditioning(prompt, out["guidance"], out["reference"])
    noise = out["noise"].generate_noise(out["latent"])
    x = out["sampler"].sample(denoise, out["sigmas"], noise, latent, seen)

    assert x.shape == z.shape and (x - z).abs().max() < 1e-5
    assert (x - latent).abs().max() > 0.02  # 2000 times the tolerance: the LoRA does something
    steps = len(out["sigmas"]) - 1
    assert model.evaluations == steps * (1 + (solver == "midpoint"))
    assert [step["i"] for step in seen] == list(range(steps)) and seen[0]["denoised"].shape == x.shape
    # The case tells right from wrong: without what was trained the result is another one.
    if trained or strength != 1:
        other = restore_latent(ours, flux, comfyui.autoencoder, prompt, Objective(), evaluations, solver, seed=7)
        assert (other - z).abs().max() > 0.005  # 500 times the tolerance


def test_other_files_are_refused_in_one_line(comfyui, tmp_path):
    image = photo()[1]
    write_lora(tmp_path / "kontext.safetensors", **ABOUT | {"objective": "kontext"}, **PLAIN)
    write_lora(tmp_path / "unknown.safetensors")
    (tmp_path / "old.pt").write_bytes(b"")
    for name in ("kontext.safetensors", "unknown.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: no bridge LoRA of kontext_min; LoraLoaderModelOnly loads it"):
            comfyui.node().build(Model(comfyui.autoencoder), comfyui.vae, image, name, 4, "euler", 1.0, 0)
    assert not comfyui.loaded
    offered = comfyui.node.INPUT_TYPES()["required"]["lora_name"][0]
    assert offered == ["kontext.safetensors", "unknown.safetensors"]


def test_the_node_is_small():
    """At most 60 lines of code: it is read before it is trusted."""
    text = NODE.read_text(encoding="utf-8")
    strings = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    docstrings = {line for n in strings for line in range(n.lineno, n.end_lineno + 1)}
    assert sum(bool(line.strip()) and i not in docstrings for i, line in enumerate(text.splitlines(), 1)) <= 60


# ------------------------------------------------------------------------------------------------------ the workflows

TYPES = runpy.run_path(str(FOLDER / "graphs.py"))["TYPES"]
# Of ComfyUI 0.3.75, all but the last: NODE_CLASS_MAPPINGS and the node_ids of comfy_extras.
EXISTING = {
    "UNETLoader", "DualCLIPLoader", "VAELoader", "LoadImage", "CLIPTextEncode", "VAEDecode", "VAEEncode",
    "SaveImage", "LoraLoaderModelOnly", "T5TokenizerOptions", "FluxGuidance", "FluxKontextImageScale",
    "ReferenceLatent", "ImageCrop", "GetImageSize", "ModelSamplingFlux", "RandomNoise", "KSamplerSelect",
    "BasicScheduler", "BasicGuider", "SamplerCustomAdvanced", "KontextMinBridge",
}  # fmt: skip


def slots(kind):
    """Inputs, widgets and outputs of a type: [(name, type), ...] each."""
    return [[tuple(text.split(":")) for text in texts.split()] for texts in TYPES[kind]]


def test_the_files_are_those_that_graphs_py_writes(tmp_path, monkeypatch):
    graphs = runpy.run_path(str(FOLDER / "graphs.py"))
    monkeypatch.setitem(graphs["main"].__globals__, "HERE", tmp_path)
    assert graphs["main"]() == 0
    for file in tmp_path.glob("*.json"):
        assert file.read_bytes() == (FOLDER / file.name).read_bytes(), f"{file.name}: python docs/comfyui/graphs.py"
    assert Image.open(tmp_path / "graph.png").size == Image.open(FOLDER / "graph.png").size
    assert (FOLDER / "graph.png").stat().st_size < 60_000


@pytest.mark.parametrize("name", ["bridge", "kontext"])
def test_the_api_form_links_what_exists(name):
    graph = json.loads((FOLDER / f"{name}.api.json").read_text())
    for node in graph.values():
        kind = node["class_type"]
        assert kind in EXISTING
        inputs, widgets, _ = slots(kind)
        assert set(node["inputs"]) == {slot for slot, _ in inputs + widgets}  # nothing left open, nothing unknown
        for slot, type in inputs + widgets:
            value = node["inputs"][slot]
            if isinstance(value, list):
                assert slots(graph[value[0]]["class_type"])[2][value[1]][1] == type, f"{kind}.{slot}"
            else:
                assert (slot, type) in widgets, f"{kind}.{slot} is not linked"
                assert isinstance(value, {"INT": int, "FLOAT": float}.get(type, str))
    assert any(node["class_type"] == "SaveImage" for node in graph.values())


@pytest.mark.parametrize("name", ["bridge", "kontext"])
def test_the_canvas_form_is_the_same_graph(name):
    canvas, graph = (json.loads((FOLDER / f"{name}.{ending}").read_text()) for ending in ("json", "api.json"))
    nodes = {node["id"]: node for node in canvas["nodes"]}
    assert canvas["last_node_id"] == max(nodes) and canvas["last_link_id"] == len(canvas["links"])
    assert {i: node["type"] for i, node in nodes.items()} == {int(i): n["class_type"] for i, n in graph.items()}
    linked = {i: {} for i in nodes}
    for number, from_node, from_slot, to_node, to_slot, type in canvas["links"]:
        out, into = nodes[from_node]["outputs"][from_slot], nodes[to_node]["inputs"][to_slot]
        assert number in out["links"] and into["link"] == number and out["type"] == into["type"] == type
        linked[to_node][into["name"]] = [str(from_node), from_slot]
    for i, node in nodes.items():
        _, widgets, outputs = slots(node["type"])
        assert [(slot["name"], slot["type"]) for slot in node["outputs"]] == outputs
        values = list(node["widgets_values"])
        for slot, _ in widgets:
            value = values.pop(0)
            linked[i].setdefault(slot, value)
            if slot in ("seed", "noise_seed"):
                assert values.pop(0) == "fixed"  # the canvas puts "control after generate" behind a seed
            if slot == "image":
                assert values.pop(0) == "image"  # and the upload button behind a picture
        assert not values and linked[i] == graph[str(i)]["inputs"]


def test_the_node_has_the_sockets_of_the_table(comfyui):
    inputs, widgets, outputs = slots("KontextMinBridge")
    fields = comfyui.node.INPUT_TYPES()["required"]
    assert list(fields) == [name for name, _ in inputs + widgets]
    for name, type in inputs + widgets:
        assert type == ("COMBO" if isinstance(fields[name][0], list) else fields[name][0])
    assert list(zip(comfyui.node.RETURN_NAMES, comfyui.node.RETURN_TYPES, strict=True)) == outputs


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)", (FOLDER / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (FOLDER / target).exists(), target
