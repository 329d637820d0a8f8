"""The official models once more, dense and slow, written from their formulas: what `moa` must agree with.

Nothing of `moa` is used here. It is itself checked against the golden numbers, and then stands in for the official
code where no golden numbers are at hand.
"""

import math

import torch
import torch.nn.functional as F

FFN_TARGETS = ("FFN_UP", "FFN_GATE", "FFN_DOWN")
NATIVE_PARTS, TRANSFORMERS_PARTS = ("attention", "feed_forward"), ("self_attn", "mlp")


def layers_of(spans, n_layers):
    if spans is None:
        return set(range(n_layers))
    pairs = [span.split("-") for span in spans.split(",")]
    return {layer for first, stop in pairs for layer in range(int(first), int(stop))}


class Official:
    """One official model. ``adapter`` has official names, ``base`` Hugging Face's; both are float32 tensors."""

    def __init__(self, variant, settings, config, base, adapter):
        self.variant, self.config, self.base, self.adapter = variant, config, base, adapter
        self.s = {key: value for key, value in settings.items() if value is not None}
        self.native = variant.startswith("LLaMA3")
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config["head_dim"]
        self.gates, self.routes, self.lb_losses = {}, {}, []

    def names(self, layer):
        """Gate columns of a block, in order."""

        def on(key):
            if self.native or key in self.s:
                return layer in layers_of(self.s.get(key, "0-0"), 99)
            return key != "prompt_layers" or "prompt_len" in self.s

        targets = self.s.get("lora_targets", "Q,K,V,O,FFN_DOWN").split(",") if on("lora_layers") else []
        columns = [t for t in ("Q", "K", "V") if t in targets]
        columns += ["PROMPT"] * on("prompt_layers")
        columns += [t for t in ("O", *FFN_TARGETS) if t in targets]
        return columns + ["PADAPTER"] * on("p_adapter_layers")

    def tensor(self, layer, name):
        prefix = "llama." if self.native else "base_model.model.model."
        if not self.native:
            name = name.replace("attention.", "self_attn.").replace("feed_forward.lora_DOWN", "mlp.lora_down")
        return self.adapter[f"{prefix}layers.{layer}.{name}"]

    def has(self, layer, name):
        try:
            self.tensor(layer, name)
        except KeyError:
            return False
        return True

    def linear(self, layer, name, x):
        bias = self.tensor(layer, f"{name}.bias") if self.has(layer, f"{name}.bias") else None
        return F.linear(x, self.tensor(layer, f"{name}.weight"), bias)

    def logits(self, ids, mask=None):
        h = F.embedding(ids, self.base["model.embed_tokens.weight"])
        length = ids.shape[1]
        hidden = torch.full((length, length), -torch.inf).triu(1).expand(ids.shape[0], 1, -1, -1)
        if mask is not None:
            hidden = hidden.masked_fill(mask[:, None, None, :] == 0, -1e30)
        for layer in range(self.config["num_hidden_layers"]):
            h = self.block(layer, h, hidden)
        return F.linear(self.norm("model.norm", h), self.base["lm_head.weight"])

    def norm(self, name, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.base[f"{name}.weight"]

    def block(self, layer, x, hidden):
        name = f"model.layers.{layer}"
        normed = self.norm(f"{name}.input_layernorm", x)
        gate = self.gate_of(layer, x if self.native else normed)
        h = x + self.attention(layer, normed, hidden, gate)
        normed = self.norm(f"{name}.post_attention_layernorm", h)
        up = F.linear(normed, self.base[f"{name}.mlp.up_proj.weight"]) + self.lora(layer, "FFN_UP", normed, gate)
        inner = F.linear(normed, self.base[f"{name}.mlp.gate_proj.weight"]) + self.lora(layer, "FFN_GATE", normed, gate)
        inner = F.silu(inner) * up
        out = F.linear(inner, self.base[f"{name}.mlp.down_proj.weight"]) + self.lora(layer, "FFN_DOWN", inner, gate)
        return h + out + self.parallel(layer, normed, gate)

    def gate_of(self, layer, x):
        """Column -> (batch, tokens or 1, 1)."""
        names = self.names(layer)
        if self.variant in ("LLaMA3_soft_moe", "LLaMA3_sparse_moe"):
            return dict.fromkeys(names, torch.ones(1, 1, 1))
        if self.variant == "LLaMA3_UniPEFT":
            mean = x.mean(1, keepdim=True)
            lora, prompt = (torch.sigmoid(self.linear(layer, f"{g}_gate", mean)) for g in ("lora", "prompt"))
            self.gates[layer] = torch.cat([lora, prompt, prompt], -1)
            return {n: prompt if n in ("PROMPT", "PADAPTER") else lora for n in names}
        if self.variant == "LLaMA3_soft_moa_instance":
            x = x.mean(1, keepdim=True)
        if self.has(layer, "adapter_type_router.w1.weight"):
            w1, w3 = (self.linear(layer, f"adapter_type_router.{w}", x) for w in ("w1", "w3"))
            logits = self.linear(layer, "adapter_type_router.w2", F.silu(w1) * w3)
        else:
            logits = self.linear(layer, "adapter_type_router", x)
        gates = torch.sigmoid(logits)
        if "sparse" in self.variant:
            threshold = self.s["max_threshold"]
            if not self.s.get("const_threshold"):
                threshold = torch.sigmoid(self.linear(layer, "adapter_threshold_fn", x)) * threshold
            gates = gates * (gates - threshold >= 0)
        self.gates[layer] = gates
        return {name: gates[..., i : i + 1] for i, name in enumerate(names)}

    def lora(self, layer, target, x, gate):
        if target not in gate:
            return 0.0
        place = "feed_forward" if target.startswith("FFN") else "attention"
        path = f"{place}.lora_{target.removeprefix('FFN_')}"
        scaling = self.s["lora_alpha"] / self.s["lora_rank"]
        number = 1 if self.variant in ("LLaMA3_sparse_moa", "soft", "sparse") else self.s["expert_num"]
        if number == 1 and self.variant != "LLaMA3_sparse_moe":
            low = self.linear(layer, f"{path}.lora_A", x)
            return gate[target] * scaling * self.linear(layer, f"{path}.lora_B", low)
        route, a, b = self.copies_route(layer, target, path, x)
        deltas = [self.linear(layer, b.format(i), self.linear(layer, a.format(i), x)) for i in range(number)]
        return gate[target] * scaling * sum(route[..., i : i + 1] * delta for i, delta in enumerate(deltas))

    def copies_route(self, layer, target, path, x):
        if self.variant != "LLaMA3_sparse_moe":
            a = f"{path}.lora_A" if self.s["hydra_moe"] else path + ".lora_A_l.{}"
            route = torch.softmax(self.linear(layer, f"{path}.router", x), -1)
            self.routes[layer, target] = route
            return route, a, path + ".lora_B_l.{}"
        number = self.s["expert_num"]
        if self.s["adamole"]:
            scores = torch.softmax(self.linear(layer, f"{path}.router", x), -1)
            scores = scores - torch.sigmoid(self.linear(layer, f"{path}.threshold_fn", x)) / number
            chosen = (scores >= 0).float()
            route = scores * chosen
            total = route.sum(-1, keepdim=True)
            route = route / torch.where(total == 0, 1.0, total)
        else:
            scores = torch.softmax(self.linear(layer, f"{path}.router.topkroute_linear", x), -1)
            chosen = F.one_hot(scores.topk(self.s["top_k"], -1).indices, number).sum(-2).float()
            route = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
        if number > 1:
            self.routes[layer, target] = route
        self.lb_losses.append(number * (chosen.mean((0, 1)) * scores.mean((0, 1))).sum())
        return route, path + ".experts.{}.lora_A", path + ".experts.{}.lora_B"

    def parallel(self, layer, x, gate):
        if "PADAPTER" not in gate:
            return 0.0
        number = self.s["expert_num"] if "expert_num" in self.s and self.variant != "LLaMA3_sparse_moa" else 1
        if number == 1:
            return gate["PADAPTER"] * self.linear(
                layer, "p_adapter.up_proj", F.silu(self.linear(layer, "p_adapter.down_proj", x))
            )
        down = "p_adapter.down_proj" if self.s["p_adapter_hydra"] else "p_adapter.down_proj_l.{}"
        route = torch.softmax(self.linear(layer, "p_adapter.router", x), -1)
        self.routes[layer, "PADAPTER"] = route
        out = 0.0
        for i in range(number):
            inner = F.silu(self.linear(layer, down.format(i), x))
            out = out + route[..., i : i + 1] * self.linear(layer, f"p_adapter.up_proj_l.{i}", inner)
        return gate["PADAPTER"] * out

    def project(self, layer, part, x):
        return F.linear(x, self.interleaved(part, self.base[f"model.layers.{layer}.self_attn.{part}_proj.weight"]))

    def interleaved(self, part, weight):
        """Base rows of q and k in the order that native rotary embedding wants."""
        if not self.native or part not in ("q", "k"):
            return weight
        return weight.view(-1, 2, self.width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    def split(self, layer, part, x):
        """(batch, tokens, all heads) -> (batch, heads, tokens, width), normed where the family does."""
        x = x.unflatten(-1, (-1, self.width))
        norm = f"model.layers.{layer}.self_attn.{part}_norm"
        return (self.norm(norm, x) if f"{norm}.weight" in self.base else x).transpose(1, 2)

    def rotate(self, x):
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, self.width, 2).float() / self.width)
        angle = torch.outer(torch.arange(x.shape[2]).float(), frequencies)
        cos, sin = angle.cos(), angle.sin()
        if self.native:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, layer, x, hidden, gate):
        query, key, value = (
            self.split(layer, part, self.project(layer, part, x) + self.lora(layer, part.upper(), x, gate))
            for part in ("q", "k", "v")
        )
        query, key = self.rotate(query), self.rotate(key)
        repeat = self.heads // self.kv_heads
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.width) + hidden
        out = (torch.softmax(scores, -1) @ value).transpose(1, 2)
        if "PROMPT" in gate:
            out = out + self.prompt(layer, x, query, gate["PROMPT"], repeat)
        out = out.flatten(-2)
        return self.project(layer, "o", out) + self.lora(layer, "O", out, gate)

    def prompt(self, layer, x, query, gate, repeat):
        tokens = self.tensor(layer, "attention.prompt.weight").unsqueeze(0)
        key, value = (
            self.split(layer, part, self.project(layer, part, tokens)).repeat_interleave(repeat, 1)
            for part in ("k", "v")
        )
        shares = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(self.width), -1)
        shares = shares * self.tensor(layer, "attention.prompt_gate")
        weights = gate
        if self.has(layer, "attention.prompt_router.weight"):
            route = torch.softmax(self.linear(layer, "attention.prompt_router", x), -1)
            self.routes[layer, "PROMPT"] = route
            weights = (gate * route).repeat_interleave(self.s["prompt_len"], -1)
        return ((shares * weights.unsqueeze(1)) @ value).transpose(1, 2)


def official_shapes(variant, settings, config):
    """Names and shapes of everything the official model trains, in its own checkpoint's terms."""
    model = Official(variant, settings, config, {}, {})
    s, native = model.s, model.native
    hidden, width = config["hidden_size"], config["head_dim"]
    q, kv, ffn = model.heads * width, model.kv_heads * width, config["intermediate_size"]
    sides = {"Q": (hidden, q), "K": (hidden, kv), "V": (hidden, kv), "O": (q, hidden)}
    sides |= {"FFN_UP": (hidden, ffn), "FFN_GATE": (hidden, ffn), "FFN_DOWN": (ffn, hidden)}
    number = 1 if variant in ("soft", "sparse", "LLaMA3_sparse_moa") else s["expert_num"]
    shapes = {}

    def linear(name, inputs, outputs, bias=True):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    for layer in range(config["num_hidden_layers"]):
        root = f"llama.layers.{layer}" if native else f"base_model.model.model.layers.{layer}"
        attention, feed_forward = (f"{root}.{part}" for part in (NATIVE_PARTS if native else TRANSFORMERS_PARTS))
        columns = model.names(layer)
        for target in columns:
            if target not in sides:
                continue
            short = target.removeprefix("FFN_")
            short = short if native else short.replace("DOWN", "down")
            path = f"{feed_forward if target.startswith('FFN') else attention}.lora_{short}"
            inputs, outputs = sides[target]
            for i in range(number):
                if variant == "LLaMA3_sparse_moe":
                    a, b = f"{path}.experts.{i}.lora_A", f"{path}.experts.{i}.lora_B"
                elif number > 1:
                    a = f"{path}.lora_A" if s["hydra_moe"] else f"{path}.lora_A_l.{i}"
                    b = f"{path}.lora_B_l.{i}"
                else:
                    a, b = f"{path}.lora_A", f"{path}.lora_B"
                linear(a, inputs, s["lora_rank"], bias=False)
                linear(b, s["lora_rank"], outputs, bias=False)
            if variant == "LLaMA3_sparse_moe" and not s["adamole"]:
                linear(f"{path}.router.topkroute_linear", inputs, number)
            elif variant == "LLaMA3_sparse_moe":
                linear(f"{path}.router", inputs, number)
                linear(f"{path}.threshold_fn", inputs, 1)
            elif number > 1:
                linear(f"{path}.router", inputs, number, bias=False)
        if "PROMPT" in columns:
            shapes[f"{attention}.prompt.weight"] = (number * s["prompt_len"], hidden)
            shapes[f"{attention}.prompt_gate"] = (1, model.heads, 1, 1)
            if number > 1:
                linear(f"{attention}.prompt_router", hidden, number)
        if "PADAPTER" in columns:
            path = f"{root}.p_adapter"
            for i in range(number):
                shared = number == 1 or s["p_adapter_hydra"]
                linear(f"{path}.down_proj" if shared else f"{path}.down_proj_l.{i}", hidden, s["p_adapter_size"])
                linear(f"{path}.up_proj" if number == 1 else f"{path}.up_proj_l.{i}", s["p_adapter_size"], hidden)
            if number > 1:
                linear(f"{path}.router", hidden, number)
        if variant == "LLaMA3_UniPEFT":
            for gate in ("lora_gate", "prompt_gate", "p_adapter_gate"):
                linear(f"{root}.{gate}", hidden, 1)
        elif not variant.endswith("_moe"):
            router, count = f"{root}.adapter_type_router", len(columns)
            inner = s.get("swi_x", 4) * count
            if s.get("swi_x", 4) == 0:
                linear(router, hidden, count)
            else:
                for name, inputs, outputs in (("w1", hidden, inner), ("w2", inner, count), ("w3", hidden, inner)):
                    linear(f"{router}.{name}", inputs, outputs)
            if "sparse" in variant and not s.get("const_threshold"):
                linear(f"{root}.adapter_threshold_fn", hidden, 1)
    return shapes


def draw(shapes, seed):
    """Random tensors, about as large as in the golden cases."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.8 if "prompt" in name and "router" not in name else 0.15
        tensors[name] = torch.randn(shape, generator=generator) * scale
    return tensors
