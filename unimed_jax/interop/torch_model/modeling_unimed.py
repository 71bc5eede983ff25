"""Runs a UniMed model in torch and transformers.

It consists of a vision encoder, a connector mixture of experts and a decoder.

This file lies next to weights that unimed_jax exported. It needs only torch, transformers, numpy and
Pillow:

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    print(model.answer(tokenizer, Image.open("slice.png"), task="vqa", text="Which plane is this?"))

Research software, not a medical device.
"""

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)


class UniMedConfig(PretrainedConfig):
    """Holds the content of config.json.

    text_config: the decoder's settings, in the words of its own family.
    unimed: all settings of the run, in unimed_jax's words.
    prompts: task -> {image: text before the first image (None: the task takes no image), between: text
        between two images, before, body, after}; the body holds "{question}".
    visual_tasks: the tasks with an image, in the order of the task tokens.
    image_token_id: stands in `input_ids` for each visual token; it is not an id of the tokenizer.
    dropped_token_ids: are left out of an answer's text.
    """

    model_type = "unimed"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config=None,
        unimed=None,
        prompts=None,
        visual_tasks=(),
        image_token_id=-1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dropped_token_ids=(),
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, self.unimed, self.prompts = text_config, unimed, prompts
        self.visual_tasks, self.image_token_id = list(visual_tasks), image_token_id
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            bos_token_id,
            eos_token_id,
            pad_token_id,
        )
        self.dropped_token_ids = list(dropped_token_ids)
        super().__init__(**kwargs)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def activation(name):
    return {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
        "quick_gelu": QuickGELU(),
        "silu": nn.SiLU(),
    }[name]


# ---- vision encoder: a pre-norm ViT under the names of Hugging Face's CLIP -----------------------


class VisionEmbeddings(nn.Module):
    def __init__(self, v):
        super().__init__()
        patch, width = v["patch_size"], v["width"]
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=v["patch_bias"])
        self.class_embedding = nn.Parameter(torch.zeros(width)) if v["cls_token"] else None
        self.position_embedding = nn.Embedding(
            int(v["cls_token"]) + (v["image_size"] // patch) ** 2, width
        )

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [N, patches, width]
        if self.class_embedding is not None:
            # [N, 1 + patches, width]
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return x + self.position_embedding.weight


class VisionAttention(nn.Module):
    def __init__(self, v):
        super().__init__()
        width, biased = v["width"], {"qv": "qv", "qkv": "qkv", "none": ""}[v["qkv_bias"]]
        self.heads = v["heads"]
        self.q_proj = nn.Linear(width, width, bias="q" in biased)
        self.k_proj = nn.Linear(width, width, bias="k" in biased)
        self.v_proj = nn.Linear(width, width, bias="v" in biased)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        count, tokens, width = x.shape
        q, k, v = (
            linear(x).view(count, tokens, self.heads, -1).transpose(1, 2)  # [N, heads, tokens, d]
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(count, tokens, width))  # [N, tokens, width]


class VisionMlp(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(v["width"], v["mlp_width"]), nn.Linear(v["mlp_width"], v["width"])
        self.activation = activation(v["activation"])

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(v["width"], eps=v["norm_eps"])
        self.self_attn = VisionAttention(v)
        self.layer_norm2 = nn.LayerNorm(v["width"], eps=v["norm_eps"])
        self.mlp = VisionMlp(v)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionLayers(nn.Module):
    def __init__(self, v):
        super().__init__()
        # Blocks after the feature layer would not be used.
        self.layers = nn.ModuleList([VisionBlock(v) for _ in range(v["depth"] + 1 + v["feature_layer"])])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def by_themselves(pixels, std):
    """Normalises pixels [N, 3, height, width] by each picture's own mean and standard deviation.

    std: of each channel, by which 1 / 255 of white was divided before.
    """
    pixels = pixels * pixels.new_tensor(std).mul(255)[:, None, None]
    pixels = pixels - pixels.mean((-2, -1), keepdim=True)
    # Less than half a grey level is no more than rounding.
    return pixels / pixels.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=0.5)


class VisionModel(nn.Module):
    """Turns normalised pixels [N, 3, size, size] into patch features [N, patches, width]."""

    def __init__(self, v):
        super().__init__()
        self.embeddings = VisionEmbeddings(v)
        self.pre_layrnorm = nn.LayerNorm(v["width"], eps=v["norm_eps"]) if v["pre_norm"] else None
        self.encoder = VisionLayers(v)
        self.post_layernorm = (
            nn.LayerNorm(v["width"], eps=v["output_norm_eps"]) if v["output_norm"] else None
        )

    def forward(self, pixels):
        x = self.embeddings(pixels)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        x = self.encoder(x)
        if self.embeddings.class_embedding is not None:
            x = x[:, 1:]
        return x if self.post_layernorm is None else self.post_layernorm(x)


# ---- connector: aggregation, router, projection experts (Uni-Med section 3.2), under its published


def aggregate(x, kind, rate):
    """Groups patch features [N, patches, width] into visual tokens [N, patches / rate, features]."""
    count, patches, width = x.shape
    if kind == "projection":
        return x.reshape(count, patches // rate, rate * width)  # [N, T, rate * width]
    grid, side = round(patches**0.5), round(rate**0.5)
    x = x.reshape(count, grid // side, side, grid // side, side, width).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(count, patches // rate, rate, width)  # [N, T, rate, width]
    if kind == "block":
        return x.flatten(2)  # [N, T, rate * width]
    return x.mean(dim=2) if kind == "avgpool" else x.amax(dim=2)


class Router(nn.Module):
    """Turns concat(task token, visual token), or one of the two, into expert logits in float32."""

    def __init__(self, width, hidden, experts, act):
        super().__init__()
        self.fc1, self.fc2, self.activation = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, experts),
            activation(act),
        )

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x))).float()


class Connector(nn.Module):
    """Turns patch features and each image's task into visual tokens.

    The features are [N, patches, width], the visual tokens [N, T, out].
    """

    def __init__(self, c, vision_width, out, tasks):
        super().__init__()
        self.c, self.tasks = c, tasks
        width = vision_width * (c["rate"] if c["aggregation"] in ("projection", "block") else 1)
        task_width, act, kind = c["task_token_width"] or width, c["activation"], c["kind"]
        self.task_tokens: Any = None
        if c["task_tokens"]:
            self.task_tokens = nn.ParameterDict(
                {task: nn.Parameter(torch.zeros(1, 1, task_width)) for task in tasks}
            )
        self.router: Any = None
        self.moe_layers: Any = None
        self.llm_proj: Any = None
        if kind == "linear":
            self.llm_proj = nn.Linear(width, out)
        elif kind.startswith("mlp"):
            inner = [c["hidden"] or out] * (int(kind[3 : kind.index("x")]) - 1)
            widths, layers = [width, *inner, out], []
            for i in range(len(widths) - 1):
                layers += [activation(act), nn.Linear(widths[i], widths[i + 1])]
            self.llm_proj = nn.Sequential(*layers[1:])
        else:
            hidden = c["hidden"] or out
            self.moe_layers = nn.ModuleList(
                nn.Sequential(nn.Linear(width, out))
                if kind == "moe_linear"
                else nn.Sequential(nn.Linear(width, hidden), activation(act), nn.Linear(hidden, out))
                for _ in range(c["experts"])
            )
            if c["router"] in ("soft", "sparse"):
                read = {"task_token": task_width + width, "task": task_width, "token": width}[
                    c["router_input"]
                ]
                self.router = Router(read, c["router_hidden"] or 4 * read, c["experts"], act)

    def forward(self, patches, tasks):
        x = aggregate(patches, self.c["aggregation"], self.c["rate"])
        if self.moe_layers is None:
            return self.llm_proj(x)
        routing = self.route(x, tasks).to(x.dtype)
        return sum(routing[..., e, None] * expert(x) for e, expert in enumerate(self.moe_layers))

    def route(self, x, tasks):
        """Gives the experts' weights [N, T, E], or [N, 1, E] if they depend only on the task."""
        experts = self.c["experts"]
        if self.c["router"] == "hard":  # a task without its own expert gets none
            return (torch.arange(experts, device=x.device) == tasks[:, None])[:, None].float()
        if self.c["router"] == "constant":
            return x.new_full((len(x), 1, experts), 1 / experts)
        parts = []
        if "task" in self.c["router_input"]:
            tokens = torch.cat([self.task_tokens[task] for task in self.tasks])[tasks]  # [N, 1, C]
            parts.append(tokens.expand(-1, x.shape[1], -1))
        if "token" in self.c["router_input"]:
            parts.append(x)
        logits = self.router(torch.cat(parts, dim=-1))  # [N, T, E]
        if self.c["router"] == "soft":  # sigmoid over its sum, in log space
            return F.logsigmoid(logits).softmax(dim=-1)
        values, kept = logits.topk(self.c["top_k"], dim=-1)
        return torch.zeros_like(logits).scatter(-1, kept, values.softmax(dim=-1))


# ---- the whole -----------------------------------------------------------------------------------


def _listed(image):
    """Gives the images of a question as a list: none, one or several."""
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def collapse(text):
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


class UniMedForCausalLM(PreTrainedModel, GenerationMixin):
    """Answers questions about images; see `answer`."""

    config_class = UniMedConfig
    base_model_prefix = "language_model"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        settings, text = config.unimed["model"], config.text_config
        self.vision_model = VisionModel(settings["vision"])
        vision_width = settings["vision"]["width"]
        self.connector = Connector(
            settings["connector"], vision_width, text.hidden_size, config.visual_tasks
        )
        # Early transformers 5 would choose sdpa for Gemma 2, which forgets the soft cap of its scores.
        capped = getattr(text, "attn_logit_softcapping", None) and text._attn_implementation in (
            None,
            "sdpa",
        )
        attention = {"attn_implementation": "eager"} if capped else {}
        self.language_model = AutoModelForCausalLM.from_config(text, **attention)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    # ---- arrays in, logits or ids out ------------------------------------------------------------

    def image_tokens(self, pixel_values, task):
        """Turns normalised pixels [N, 3, size, size] into visual tokens [N, T, width].

        task: the name of each image's task, or one for all. If the model normalises each picture by
        itself, it does so here.
        """
        connector = self.config.unimed["model"]["connector"]
        hard = connector["kind"].startswith("moe_") and connector["router"] == "hard"
        names = [task] * len(pixel_values) if isinstance(task, str) else list(task or ())
        if len(names) != len(pixel_values):
            raise ValueError(
                f"{len(pixel_values)} images need as many tasks (or one for all), not {task!r}."
            )
        for name in names:
            if name not in self.config.visual_tasks:
                raise ValueError(
                    f"{name!r} is not a task with an image; choose from {self.config.visual_tasks}."
                )
            if hard and self.config.visual_tasks.index(name) >= connector["experts"]:
                raise ValueError(f"{name!r} has no expert in this model; ask for another task.")
        ids = torch.tensor([self.config.visual_tasks.index(name) for name in names], device=self.device)
        if self.config.unimed["model"]["vision"].get("normalise") == "picture":
            pixel_values = by_themselves(
                pixel_values.float(), self.config.unimed["model"]["vision"]["std"]
            )
        features = self.vision_model(pixel_values.to(self.device, self.dtype))
        return self.connector(features, ids)

    def embed(self, input_ids, pixel_values=None, task=None):
        """Embeds tokens and puts the images' visual tokens into the places meant for them.

        These are the places where `input_ids` is `image_token_id`, in their order.
        """
        places = input_ids == self.config.image_token_id
        # Gemma's embedding scales its output; visual tokens stay as the connector makes them.
        embedding = self.get_input_embeddings()
        x = embedding(input_ids.masked_fill(places, self.config.pad_token_id))
        if pixel_values is None:
            if places.any():
                raise ValueError(
                    "input_ids hold places of visual tokens, but there are no pixel_values."
                )
            return x
        tokens = self.image_tokens(pixel_values, task).to(x.dtype)
        if places.sum() != tokens.shape[0] * tokens.shape[1]:
            raise ValueError(
                f"input_ids hold {int(places.sum())} places of visual tokens, but {len(tokens)} "
                f"images make {tokens.shape[0] * tokens.shape[1]}."
            )
        if self.config.text_config.model_type in ("gemma", "gemma2") and not hasattr(
            embedding, "embed_scale"
        ):
            # in early transformers 5 the model scales whatever it is given
            tokens = tokens / x.shape[-1] ** 0.5
        return x.masked_scatter(places[..., None].expand_as(x), tokens)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        task=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Runs the model on a batch of token ids and images.

        Returns the decoder's output (logits, cache, and the loss if `labels` are given).

        input_ids: [B, S], left padded where `attention_mask` is 0. pixel_values: [N, 3, size, size],
        the images of all rows in order. task: a name for all of them, or one for each. All other
        arguments go to the decoder.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values, task)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[
                :, -inputs_embeds.shape[1] :
            ]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, task=None, **kwargs):
        """Generates the ids of the answers [B, new], without prompts.

        The arguments are those of `forward` and of transformers' `generate`.
        """
        if input_ids is not None:
            kwargs["inputs_embeds"] = self.embed(input_ids, pixel_values, task)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(input_ids)
        return super().generate(**kwargs)

    # ---- questions in, answers out ---------------------------------------------------------------

    def answer(self, tokenizer, image=None, task="vqa", text="", **kwargs):
        """Answers one question, greedily, under the prompt of unimed_jax's evaluation.

        image: PIL image or uint8 array [H, W, 3]; a list of them for a question about several, in
            their order; None if the task takes none.
        text: the question (vqa, qa), what to find (refer), or a box as {<x1><y1><x2><y2>} in
            hundredths of the image (identify); caption and cls need none.
        """
        return self.answers(tokenizer, [(image, task, text)], **kwargs)[0]

    def answers(self, tokenizer, questions, **kwargs):
        """Answers several (image, task, text) as one batch; `image` is what `answer` takes."""
        ids = self.generate(**self.prepare(tokenizer, questions), do_sample=False, **kwargs)
        out = []
        for new in ids.tolist():
            end = new.index(self.config.eos_token_id) if self.config.eos_token_id in new else len(new)
            kept = [i for i in new[:end] if i not in self.config.dropped_token_ids]
            words = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            out.append(words.strip())
        return out

    def prepare(self, tokenizer, questions):
        """Makes the arguments of `generate` for several questions.

        questions: (image, task, text) each. Rows are padded on the left.
        """
        shown = [_listed(image) for image, _, _ in questions]
        rows = [
            self.prompt_ids(tokenizer, len(images), task, text)
            for images, (_, task, text) in zip(shown, questions, strict=True)
        ]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self.config.pad_token_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        batch: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
        }
        pictures = [
            (self.pixels(image), task)
            for images, (_, task, _) in zip(shown, questions, strict=True)
            for image in images
        ]
        if pictures:
            batch["pixel_values"] = torch.stack([pixels for pixels, _ in pictures]).to(self.device)
            batch["task"] = [task for _, task in pictures]
        return batch

    def prompt_ids(self, tokenizer, images, task, text):
        """Makes the ids of a prompt about so many images; whitespace is tidied as in training."""
        config, rules = self.config, self.config.unimed["text"]
        if task not in config.prompts:
            raise ValueError(f"{task!r} is not a task; choose from {', '.join(config.prompts)}.")
        form = config.prompts[task]
        visual = form["image"] is not None
        if visual != bool(images):
            raise ValueError(
                f"task {task!r} "
                f"{'needs an image' if visual else 'is text only; ask vqa about an image'}."
            )

        def shorten(words):
            limit = rules["max_words"]
            return collapse(words) if limit is None else " ".join(collapse(words).split(" ")[:limit])

        def encode(words):  # control tokens spelt out in the text are plain characters
            return tokenizer.encode(words, add_special_tokens=False, split_special_tokens=True)

        body = collapse(form["body"].replace("{question}", shorten(text) if visual else text))
        body = body if visual else shorten(body)
        ids = [config.bos_token_id] * (2 if rules["double_bos"] else 1)
        if visual:
            settings = config.unimed["model"]
            side = settings["vision"]["image_size"] // settings["vision"]["patch_size"]
            places = [config.image_token_id] * (side**2 // settings["connector"]["rate"])
            ids += encode(form["image"]) + places
            ids += (encode(form["between"]) + places) * (images - 1)
        ids += encode(form["before"] + body + form["after"])
        if len(ids) > rules["max_prompt"]:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, more than {rules['max_prompt']}; shorten the text."
            )
        return ids

    def pixels(self, image):
        """Turns an image into normalised float32 pixels [3, size, size]; bicubic with antialiasing.

        image: PIL image or uint8 array [H, W, 3]. A picture is turned as its EXIF orientation says, and
        white lies behind what is transparent.
        """
        vision = self.config.unimed["model"]["vision"]
        size = vision["image_size"]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        image = ImageOps.exif_transpose(image)
        # deeper than 8 bits: white is the smallest 2^n - 1 that holds all of it
        if image.mode.startswith("I"):
            deep = np.asarray(image)
            white = max(255, 2 ** int(deep.max()).bit_length() - 1)
            image = Image.fromarray(np.round(np.clip(deep, 0, None) / white * 255).astype(np.uint8))
        if image.has_transparency_data:
            clear = image.convert("RGBA")
            image = Image.new("RGB", clear.size, "white")
            image.paste(clear, mask=clear)
        image = image.convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        mean, std = (np.asarray(vision[key], np.float32) for key in ("mean", "std"))
        pixels = np.asarray(image).astype(np.float32) * (1 / (255 * std)) - mean / std  # [size, size, 3]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # [3, size, size]
