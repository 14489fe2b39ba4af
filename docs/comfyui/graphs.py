"""The workflows of this folder, written from one description: `python docs/comfyui/graphs.py`.

bridge.json, kontext.json            for the canvas of ComfyUI
bridge.api.json, kontext.api.json    for its HTTP interface, POST /prompt
graph.png                            the bridge, as the README shows it

Source: ComfyUI 0.3.75 (commit 9d8a8179) for the names and the order of inputs, widgets, and outputs: nodes.py and
comfy_extras/nodes_custom_sampler.py, nodes_flux.py, nodes_edit_model.py, nodes_cond.py, nodes_images.py,
nodes_model_advanced.py.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent

# Type of a node -> inputs, widgets, outputs, each "name:TYPE name:TYPE". A widget is a value that a link may replace.
TYPES = {
    "UNETLoader": ("", "unet_name:COMBO weight_dtype:COMBO", "MODEL:MODEL"),
    "DualCLIPLoader": ("", "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO", "CLIP:CLIP"),
    "VAELoader": ("", "vae_name:COMBO", "VAE:VAE"),
    "LoadImage": ("", "image:COMBO", "IMAGE:IMAGE MASK:MASK"),
    "KontextMinBridge": (
        "model:MODEL vae:VAE image:IMAGE",
        "lora_name:COMBO evaluations:INT solver:COMBO strength:FLOAT seed:INT",
        "model:MODEL noise:NOISE sampler:SAMPLER sigmas:SIGMAS latent:LATENT reference:LATENT prompt:STRING "
        "guidance:FLOAT width:INT height:INT",
    ),
    "T5TokenizerOptions": ("clip:CLIP", "min_padding:INT min_length:INT", "CLIP:CLIP"),
    "CLIPTextEncode": ("clip:CLIP", "text:STRING", "CONDITIONING:CONDITIONING"),
    "FluxGuidance": ("conditioning:CONDITIONING", "guidance:FLOAT", "CONDITIONING:CONDITIONING"),
    "ReferenceLatent": ("conditioning:CONDITIONING latent:LATENT", "", "CONDITIONING:CONDITIONING"),
    "BasicGuider": ("model:MODEL conditioning:CONDITIONING", "", "GUIDER:GUIDER"),
    "SamplerCustomAdvanced": (
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        "",
        "output:LATENT denoised_output:LATENT",
    ),
    "VAEDecode": ("samples:LATENT vae:VAE", "", "IMAGE:IMAGE"),
    "VAEEncode": ("pixels:IMAGE vae:VAE", "", "LATENT:LATENT"),
    "ImageCrop": ("image:IMAGE", "width:INT height:INT x:INT y:INT", "IMAGE:IMAGE"),
    "SaveImage": ("images:IMAGE", "filename_prefix:STRING", ""),
    "LoraLoaderModelOnly": ("model:MODEL", "lora_name:COMBO strength_model:FLOAT", "MODEL:MODEL"),
    "ModelSamplingFlux": ("model:MODEL", "max_shift:FLOAT base_shift:FLOAT width:INT height:INT", "MODEL:MODEL"),
    "FluxKontextImageScale": ("image:IMAGE", "", "IMAGE:IMAGE"),
    "GetImageSize": ("image:IMAGE", "", "width:INT height:INT batch_size:INT"),
    "RandomNoise": ("", "noise_seed:INT", "NOISE:NOISE"),
    "KSamplerSelect": ("", "sampler_name:COMBO", "SAMPLER:SAMPLER"),
    "BasicScheduler": ("model:MODEL", "scheduler:COMBO steps:INT denoise:FLOAT", "SIGMAS:SIGMAS"),
}
AFTER = {"seed": "fixed", "noise_seed": "fixed", "image": "image"}  # the canvas adds a second value to these widgets

Graph = list[tuple[tuple[int, int], str, dict[str, Any]]]  # (column, y), type, inputs; "TYPE.output" is a link

LOADERS: Graph = [
    ((0, 0), "UNETLoader", {"unet_name": "flux1-dev-kontext_fp8_scaled.safetensors", "weight_dtype": "default"}),
    ((0, 130), "DualCLIPLoader", {
        "clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "type": "flux", "device": "default",
    }),
    ((0, 310), "VAELoader", {"vae_name": "ae.safetensors"}),
    ((0, 420), "LoadImage", {"image": "old.jpg"}),
    # Training pads T5's tokens to 512, ComfyUI to 256.
    ((1, 0), "T5TokenizerOptions", {"clip": "DualCLIPLoader.CLIP", "min_padding": 0, "min_length": 512}),
]  # fmt: skip
BRIDGE: Graph = [
    *LOADERS,
    ((1, 160), "KontextMinBridge", {
        "model": "UNETLoader.MODEL", "vae": "VAELoader.VAE", "image": "LoadImage.IMAGE",
        "lora_name": "lora.safetensors", "evaluations": 4, "solver": "midpoint", "strength": 1.0, "seed": 42,
    }),
    ((2, 0), "CLIPTextEncode", {"clip": "T5TokenizerOptions.CLIP", "text": "KontextMinBridge.prompt"}),
    ((2, 130), "FluxGuidance", {
        "conditioning": "CLIPTextEncode.CONDITIONING", "guidance": "KontextMinBridge.guidance",
    }),
    ((2, 260), "ReferenceLatent", {
        "conditioning": "FluxGuidance.CONDITIONING", "latent": "KontextMinBridge.reference",
    }),
    ((2, 390), "BasicGuider", {"model": "KontextMinBridge.model", "conditioning": "ReferenceLatent.CONDITIONING"}),
    ((3, 0), "SamplerCustomAdvanced", {
        "noise": "KontextMinBridge.noise", "guider": "BasicGuider.GUIDER", "sampler": "KontextMinBridge.sampler",
        "sigmas": "KontextMinBridge.sigmas", "latent_image": "KontextMinBridge.latent",
    }),
    ((3, 190), "VAEDecode", {"samples": "SamplerCustomAdvanced.output", "vae": "VAELoader.VAE"}),
    # Undoes the padding to multiples of 16.
    ((3, 310), "ImageCrop", {
        "image": "VAEDecode.IMAGE", "width": "KontextMinBridge.width", "height": "KontextMinBridge.height",
        "x": 0, "y": 0,
    }),
    ((3, 490), "SaveImage", {"images": "ImageCrop.IMAGE", "filename_prefix": "restored"}),
]  # fmt: skip
KONTEXT: Graph = [
    *LOADERS,
    ((1, 160), "FluxKontextImageScale", {"image": "LoadImage.IMAGE"}),
    ((1, 250), "GetImageSize", {"image": "FluxKontextImageScale.IMAGE"}),
    ((1, 380), "VAEEncode", {"pixels": "FluxKontextImageScale.IMAGE", "vae": "VAELoader.VAE"}),
    ((2, 0), "CLIPTextEncode", {
        "clip": "T5TokenizerOptions.CLIP",
        "text": "Restore this photo: remove blur, noise and compression artifacts.",
    }),
    ((2, 130), "FluxGuidance", {"conditioning": "CLIPTextEncode.CONDITIONING", "guidance": 2.5}),
    ((2, 260), "ReferenceLatent", {"conditioning": "FluxGuidance.CONDITIONING", "latent": "VAEEncode.LATENT"}),
    ((2, 390), "LoraLoaderModelOnly", {
        "model": "UNETLoader.MODEL", "lora_name": "lora.safetensors", "strength_model": 1.0,
    }),
    # Kontext's schedule depends on the size of the picture; without this node ComfyUI takes that of 1024 x 1024.
    ((2, 530), "ModelSamplingFlux", {
        "model": "LoraLoaderModelOnly.MODEL", "max_shift": 1.15, "base_shift": 0.5,
        "width": "GetImageSize.width", "height": "GetImageSize.height",
    }),
    ((3, 0), "BasicGuider", {"model": "ModelSamplingFlux.MODEL", "conditioning": "ReferenceLatent.CONDITIONING"}),
    ((3, 120), "RandomNoise", {"noise_seed": 42}),
    ((3, 230), "KSamplerSelect", {"sampler_name": "euler"}),
    ((3, 340), "BasicScheduler", {
        "model": "ModelSamplingFlux.MODEL", "scheduler": "simple", "steps": 28, "denoise": 1.0,
    }),
    ((4, 0), "SamplerCustomAdvanced", {
        "noise": "RandomNoise.NOISE", "guider": "BasicGuider.GUIDER", "sampler": "KSamplerSelect.SAMPLER",
        "sigmas": "BasicScheduler.SIGMAS", "latent_image": "VAEEncode.LATENT",
    }),
    ((4, 190), "VAEDecode", {"samples": "SamplerCustomAdvanced.output", "vae": "VAELoader.VAE"}),
    ((4, 310), "SaveImage", {"images": "VAEDecode.IMAGE", "filename_prefix": "restored"}),
]  # fmt: skip


class Slot(NamedTuple):
    """An input, a widget, or an output."""

    name: str
    type: str


def slots(kind: str) -> list[list[Slot]]:
    """Inputs, widgets and outputs of a type of node."""
    return [[Slot(*text.split(":")) for text in texts.split()] for texts in TYPES[kind]]


def source(graph: Graph, value: Any) -> tuple[int, int] | None:
    """Number of the node (from 1) and of the output (from 0) that a link comes from; None for a plain value."""
    kinds = [kind for _, kind, _ in graph]
    kind, _, output = value.partition(".") if isinstance(value, str) else ("", "", "")
    if kind not in kinds:
        return None
    return kinds.index(kind) + 1, [slot.name for slot in slots(kind)[2]].index(output)


def api(graph: Graph) -> dict[str, Any]:
    """The form that POST /prompt takes."""
    nodes = {}
    for number, (_, kind, values) in enumerate(graph, 1):
        links = {name: source(graph, value) for name, value in values.items()}
        inputs = {name: [str(link[0]), link[1]] if (link := links[name]) else v for name, v in values.items()}
        nodes[str(number)] = {"class_type": kind, "inputs": inputs}
    return nodes


def shown(graph: Graph, kind: str, values: dict[str, Any]) -> list[Slot]:
    """The sockets on the left of a node: its inputs, and the widgets that a link replaces."""
    inputs, widgets, _ = slots(kind)
    return inputs + [slot for slot in widgets if source(graph, values[slot.name])]


def canvas(graph: Graph) -> dict[str, Any]:
    """The form that the canvas opens and saves."""
    nodes, links = [], []
    for number, (place, kind, values) in enumerate(graph, 1):
        _, widgets, outputs = slots(kind)
        node = {"id": number, "type": kind, "pos": [380 * place[0], place[1] * 2], "size": [320, height(kind)]}
        node |= {"flags": {}, "order": number - 1, "mode": 0, "inputs": [], "widgets_values": []}
        node["outputs"] = [{"name": s.name, "type": s.type, "links": []} for s in outputs]
        node["properties"] = {"Node name for S&R": kind}
        for place, slot in enumerate(shown(graph, kind, values)):
            from_node, from_slot = source(graph, values[slot.name])
            links.append([len(links) + 1, from_node, from_slot, number, place, slot.type])
            widget = {"widget": {"name": slot.name}} if slot in widgets else {}
            node["inputs"].append({"name": slot.name, "type": slot.type, "link": len(links), **widget})
        empty = {"STRING": "", "INT": 0, "FLOAT": 0.0}  # what stands behind a link
        for slot in widgets:
            value = values[slot.name]
            node["widgets_values"].append(empty[slot.type] if source(graph, value) else value)
            if slot.name in AFTER:
                node["widgets_values"].append(AFTER[slot.name])
        nodes.append(node)
    for number, from_node, from_slot, *_ in links:
        nodes[from_node - 1]["outputs"][from_slot]["links"].append(number)
    return {"last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
            "config": {}, "extra": {}, "version": 0.4}  # fmt: skip


def height(kind: str) -> int:
    """Of a node on the canvas, in its units."""
    inputs, widgets, outputs = slots(kind)
    return 40 + 22 * max(len(inputs), len(outputs)) + 28 * len(widgets) + (280 if kind == "LoadImage" else 0)


# ---------------------------------------------------------------------------------------------------- the picture

SCALE, ROW, WIDTH, GAP = 2, 15, 186, 62  # drawn at twice the size, then reduced
COLOURS = {
    "MODEL": "#7a6bc4", "CLIP": "#c9a400", "VAE": "#d0453f", "IMAGE": "#3f7fd0", "LATENT": "#d158a6",
    "CONDITIONING": "#e08a1e", "NOISE": "#777777", "SAMPLER": "#5f8f3f", "SIGMAS": "#2f8f8a", "GUIDER": "#2f6f9f",
    "STRING": "#55a055", "FLOAT": "#8a8a55", "INT": "#4f6f8f",
}  # fmt: skip


def draw(graph: Graph) -> Image.Image:
    """Boxes with their sockets, and the links between them."""
    font, bold = (ImageFont.load_default(size * SCALE) for size in (11, 12))
    left, right, boxes = {}, {}, []  # places of the sockets
    for number, ((column, y), kind, values) in enumerate(graph, 1):
        x, outputs = 12 + column * (WIDTH + GAP), slots(kind)[2]
        inputs = shown(graph, kind, values)
        plain = [f"{k} = {v}" for k, v in values.items() if not source(graph, v)]
        rows = max(len(inputs), len([s for s in outputs if s.type != "MASK"]))
        top = 12 + y
        boxes.append((x, top, 24 + ROW * (rows + len(plain)), kind, plain, rows))
        left |= {(number, s.name): (x, top + 28 + ROW * i) for i, s in enumerate(inputs)}
        right |= {(number, i): (x + WIDTH, top + 28 + ROW * i) for i, _ in enumerate(outputs)}
    size = max(b[0] for b in boxes) + WIDTH + 12, max(b[1] + b[2] for b in boxes) + 12
    image = Image.new("RGB", (SCALE * size[0], SCALE * size[1]), "white")
    pen = ImageDraw.Draw(image)
    for number, (_, kind, values) in enumerate(graph, 1):
        for slot in shown(graph, kind, values):
            start, end = right[source(graph, values[slot.name])], left[number, slot.name]
            bend = max(30, abs(end[0] - start[0]) / 2) if end[0] > start[0] else 45
            points = [(a[0] + o, a[1]) for a, o in ((start, 0), (start, bend), (end, -bend), (end, 0))]
            curve = []
            for k in range(41):
                t = k / 40
                weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
                curve.append(tuple(SCALE * sum(w * p[i] for w, p in zip(weights, points, strict=True)) for i in (0, 1)))
            pen.line(curve, COLOURS[slot.type], 3)
    for x, top, tall, kind, plain, rows in boxes:
        own = kind == "KontextMinBridge"
        box = [SCALE * v for v in (x, top, x + WIDTH, top + tall)]
        pen.rounded_rectangle(box, 10, "#fff4d6" if own else "#f1f1f1", "#b08000" if own else "#909090", SCALE)
        pen.text((SCALE * (x + 8), SCALE * (top + 4)), kind, "#202020", bold)
        for i, text in enumerate(plain):
            text = text if len(text) < 32 else text[:29] + "..."
            pen.text((SCALE * (x + 8), SCALE * (top + 21 + ROW * (rows + i))), text, "#707070", font)
    for number, (_, kind, values) in enumerate(graph, 1):
        sides = [(left[number, s.name], s, "lm", 8) for s in shown(graph, kind, values)]
        sides += [(right[number, i], s, "rm", -8) for i, s in enumerate(slots(kind)[2]) if s.type != "MASK"]
        for (x, y), slot, anchor, offset in sides:
            pen.ellipse([SCALE * v for v in (x - 3, y - 3, x + 3, y + 3)], COLOURS[slot.type])
            pen.text((SCALE * (x + offset), SCALE * y), slot.name, "#202020", font, anchor)
    return image.resize(size, Image.Resampling.LANCZOS)


def main() -> int:
    """All files of the list at the top; 0."""
    for name, graph in (("bridge", BRIDGE), ("kontext", KONTEXT)):
        for ending, content in (("json", canvas(graph)), ("api.json", api(graph))):
            (HERE / f"{name}.{ending}").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    picture = draw(BRIDGE).quantize(96, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(HERE / "graph.png", optimize=True)
    print(f"graph.png: {(HERE / 'graph.png').stat().st_size // 1000} kB, {picture.size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
