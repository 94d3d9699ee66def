"""Captured attention maps against the softmax that the same model computes with its fused attention off, in float64."""

import copy
import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fastib
import fastib.models
from fastib.nn import MHCA, apply_mhca, capture_cls_attention

SMALL = {"img_size": 32, "num_classes": 5, "embed_dim": 24, "num_heads": 3, "depth": 2}
MODELS = {
    "vit": ("vit_tiny_patch16_224", SMALL | {"patch_size": 8}),
    "qk-norm": ("vit_tiny_patch16_224", SMALL | {"patch_size": 8, "qk_norm": True}),
    "registers": ("vit_tiny_patch16_224", SMALL | {"patch_size": 8, "reg_tokens": 4}),
    "deit": ("deit_tiny_patch16_224", SMALL | {"patch_size": 8}),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL | {"patch_size": 8}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 42}),
    "cait": ("cait_xxs24_224", SMALL | {"patch_size": 8}),
    "pit": ("pit_ti_distilled_224", {"img_size": 48, "num_classes": 5, "base_dims": (8, 8, 8), "depth": (1, 2, 1)}),
    "beit": ("beit_base_patch16_224", SMALL | {"patch_size": 8}),
    "rel-pos": ("vit_relpos_medium_patch16_cls_224", SMALL | {"patch_size": 8}),
    "rope": ("eva02_tiny_patch14_224", SMALL | {"img_size": 42}),
    "separate q and k": ("eva02_large_patch14_224", SMALL | {"img_size": 42}),
    "parallel": ("vit_pwee_patch16_reg1_gap_256", SMALL | {"patch_size": 8, "class_token": True}),
    "cit": ("cit_tiny_patch16_224", SMALL | {"patch_size": 8}),
}
DHVT = ("dhvt_tiny_patch4_32", SMALL | {"patch_size": 8})  # whose attention has no unfused form
PREFIX = {"registers": 5, "distilled": 2, "dinov2": 5, "pit": 2, "parallel": 2, "cit": 3}


def build(name: str, dtype=torch.float64, **options) -> nn.Module:
    """A small model whose weights are large enough that its attention is far from even."""
    torch.manual_seed(0)
    model_name, kwargs = (MODELS | {"dhvt": DHVT})[name]
    model = timm.create_model(model_name, **kwargs | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).train()


def images_for(model: nn.Module, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def unfused_rows(model: nn.Module, images: torch.Tensor, prefix: int, over: str) -> list[torch.Tensor]:
    """The class token's rows of the probabilities in each layer, with fused attention off."""
    layers = [m for m in model.modules() if hasattr(m, "fused_attn") and hasattr(m, "attn_drop")]
    rows, handles = [], []
    for layer in layers:
        layer.fused_attn = False
        handles.append(layer.attn_drop.register_forward_hook(lambda _, args, __: rows.append(args[0][:, :, 0])))
    model(images)
    for layer, handle in zip(layers, handles, strict=True):
        layer.fused_attn = True
        handle.remove()
    rows = [row[..., prefix:] for row in rows]
    return [row / row.sum(-1, keepdim=True) for row in rows] if over == "patches" else rows


def close(actual, expected, **tolerances) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **{"rtol": 1e-9, "atol": 1e-12} | tolerances)


@pytest.mark.parametrize("over", ["patches", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_maps_are_those_of_the_unfused_model(name, over):
    model = build(name).eval()
    images, prefix = images_for(model), PREFIX.get(name, 1)
    with capture_cls_attention(model, over=over) as captured:
        model(images)
    assert captured.num_prefix_tokens == prefix
    close(captured.maps, unfused_rows(model, images, prefix, over))
    assert max(m.amax().item() for m in captured.maps) > 0.2  # far from even, so that a wrong row would show


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_unfused_model(name):
    model = build(name).eval()  # the relative positions come out of an MLP with dropout
    images, prefix = images_for(model), PREFIX.get(name, 1)

    def gradients(maps):
        generator = torch.Generator().manual_seed(2)
        loss = sum((torch.randn(m.shape, generator=generator, dtype=m.dtype) * m).sum() for m in maps)
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)

    with capture_cls_attention(model) as captured:
        model(images)
    actual = gradients(captured.maps)
    close(actual, gradients(unfused_rows(model, images, prefix, "patches")), rtol=1e-8, atol=1e-10)
    assert sum(g.abs().amax() > 1e-3 for g in actual) > 5


def test_order_names_and_grids():
    model = build("pit")
    with capture_cls_attention(model) as captured:
        model(images_for(model))
    assert captured.names == [f"transformers.{i}.blocks.{j}.attn" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0))]
    assert captured.grids == [(5, 5), (3, 3), (3, 3), (2, 2)]
    assert [m.shape for m in captured.maps] == [(2, 2, 25), (2, 4, 9), (2, 4, 9), (2, 8, 4)]
    with pytest.raises(ValueError, match=r"maps of different grids: \[\(2, 2\), \(3, 3\), \(5, 5\)\]"):
        captured.stacked()
    model = build("vit")
    with fastib.capture_cls_attention(model) as captured:
        model(images_for(model))
    stacked = captured.stacked()
    torch.testing.assert_close(stacked[:, 3:5], captured.maps[1][:, :2], rtol=0, atol=0)


def test_cait_has_maps_where_the_class_token_attends():
    model = build("cait")
    with capture_cls_attention(model) as captured:
        model(images_for(model))
    assert captured.names == ["blocks_token_only.0.attn", "blocks_token_only.1.attn"]


def test_images_that_are_not_square():
    model = build("vit", dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 16, 64, dtype=torch.float64)  # 2 x 8 patches, as many as 4 x 4
    with capture_cls_attention(model) as captured:
        model(images)
    assert captured.grids == [(2, 8), (2, 8)]
    close(captured.maps, unfused_rows(model, images, 1, "patches"))


def test_equation_3_as_printed_has_no_scale():
    model = build("vit").eval()
    images = images_for(model)
    with capture_cls_attention(model, scale=1.0) as captured, capture_cls_attention(model) as scaled:
        model(images)
    for ours, theirs in zip(captured.maps, scaled.maps, strict=True):
        torch.testing.assert_close(ours, (8**0.5 * theirs.log()).softmax(-1), rtol=1e-9, atol=1e-12)


def test_mhca():
    model = apply_mhca(build("vit", qk_norm=True).float(), [1]).double().eval()
    with torch.no_grad():
        model.blocks[1].attn.alpha.fill_(0.7)
    attn, inputs = model.blocks[1].attn, []
    handle = attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with capture_cls_attention(model) as captured:
        model(images_for(model))
    handle.remove()
    q, k, _ = attn.qkv(inputs[0]).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = (attn.q_norm(q)[:, :, 0, None] * attn.k_norm(k)[:, :, 1:]).sum(-1).mul(8**-0.5).softmax(-1)
    assert isinstance(attn, MHCA) and captured.names == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(captured.maps[1], expected, rtol=1e-9, atol=1e-12)


def head_token_rows(model: nn.Module, images: torch.Tensor, over: str) -> list[torch.Tensor]:
    """The class token's rows of a DHVT: softmax over N + H tokens by the words of the paper, cut to the patches."""
    rows = []

    def row(attn, args):
        x = torch.cat((args[0], attn.head_tokens(args[0])), dim=1)  # (B, N + H, dim)
        q, k, _ = attn.qkv(x).reshape(*x.shape[:2], 3, 3, 8).permute(2, 0, 3, 1, 4)
        probs = (q[:, :, :1] @ k.transpose(-2, -1)).mul(8**-0.5).softmax(-1)[:, :, 0, 1:-3]
        rows.append(probs / probs.sum(-1, keepdim=True) if over == "patches" else probs)

    handles = [block.attn.register_forward_pre_hook(row) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("over", ["patches", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dhvt(over, checkpointing):
    """Its head tokens are keys of their own, projected behind the others. 2 x 8 patches are as many as 4 x 4."""
    model = build("dhvt", dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(2, 3, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    parameters = list(model.parameters())

    def gradients(maps):
        loss = sum((w * m).sum() for w, m in zip(weights, maps, strict=True))
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    expected = head_token_rows(model, images, over)
    model.set_grad_checkpointing(checkpointing)
    with capture_cls_attention(model, over=over) as captured:
        model(images[:1])
        model(images)
    assert captured.names == ["blocks.0.attn", "blocks.1.attn"] and captured.grids == [(2, 8), (2, 8)]
    close(captured.maps, expected)
    assert captured.maps[0].amax() > 0.2
    close(gradients(captured.maps), gradients(expected), rtol=1e-8, atol=1e-10)


def test_dhvt_after_a_pass_that_broke_off():
    model = build("dhvt").eval()
    images, attn = images_for(model), model.blocks[0].attn
    head_proj, attn.head_proj = attn.head_proj, nn.Linear(3, 3)
    with capture_cls_attention(model) as captured:
        with pytest.raises(RuntimeError):
            model(images)
        attn.head_proj = head_proj
        model(images)
    close(captured.maps, head_token_rows(model, images, "patches"))


class Counter(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **kwargs or {})


def test_nothing_is_projected_twice_and_the_fused_attention_stays_on():
    model, counts = build("vit"), []
    images = images_for(model)
    for with_capture in (False, True):
        with Counter() as counter:
            if with_capture:
                with capture_cls_attention(model):
                    model(images)
            else:
                model(images)
        counts.append({name: counter.calls.count(name) for name in ("linear", "scaled_dot_product_attention")})
    assert counts[0] == counts[1] and counts[0]["scaled_dot_product_attention"] == 2


def snapshot(model: nn.Module) -> list:
    return [
        (
            name,
            set(vars(m)),
            *(list(getattr(m, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks")),
            m.forward,
        )
        for name, m in model.named_modules()
    ]


def test_the_model_stays_as_it_was_also_after_an_exception():
    model = build("deit")
    images, before = images_for(model), snapshot(model)
    expected = model(images)
    with capture_cls_attention(model):
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
        assert snapshot(model) == before
    capture = capture_cls_attention(model)
    with pytest.raises(RuntimeError), capture:
        model(images[:, :2])
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="has not run inside"):
        capture.maps  # noqa: B018
    model(images)  # nothing listens any more
    assert not capture.names
    with capture:
        model(images)
    assert len(capture.maps) == 2


def test_other_models_and_other_passes():
    model, other = build("vit"), build("deit")
    images = images_for(model)
    with capture_cls_attention(model) as captured:
        model(images[:1])
        other(images)
        model(images)
        other(images)
    assert captured.names == ["blocks.0.attn", "blocks.1.attn"]
    close(captured.maps, unfused_rows(model, images, 1, "patches"))


def test_memory_is_given_back():
    model = build("vit")
    with capture_cls_attention(model) as captured:
        model(images_for(model))
    sum(m.square().sum() for m in captured.maps).backward()
    alive = weakref.ref(captured.maps[0])
    del captured
    gc.collect()
    assert alive() is None


def test_autocast():
    model = build("vit", torch.float32).eval()
    images = images_for(model, torch.float32)
    exact = unfused_rows(copy.deepcopy(model).double(), images.double(), 1, "patches")
    with torch.autocast("cpu", torch.bfloat16):
        with capture_cls_attention(model) as captured:
            model(images)
        theirs = unfused_rows(model, images, 1, "patches")
    for ours, reference, e in zip(captured.maps, theirs, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - e).abs().amax()
        assert error <= 2 * (reference.double() - e).abs().amax() + 2.0**-8 * e.amax()


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("attention", ["timm", "mhca"])
def test_checkpointing(attention, backward_inside):
    """The norms of an MHCA's queries and keys run once more for its map, which the recomputation does not see."""
    model = build("vit", qk_norm=True)
    if attention == "mhca":
        apply_mhca(model, [0, 1], rpe_drop=0.0)
    images, results = images_for(model), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        with capture_cls_attention(model) as captured:
            loss = model(images).square().sum() + sum(m.square().sum() for m in captured.maps)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert len(captured.maps) == 2
        results.append([*captured.maps, *(p.grad for p in model.parameters())])
    close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit", "mhca", "dhvt"])
def test_reentrant_checkpointing_says_that_it_cannot(name, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    model = apply_mhca(build("vit"), [0, 1]) if name == "mhca" else build(name)
    model.set_grad_checkpointing(True)
    message = r"blocks\.0\.attn runs without gradients.*use_reentrant=False"
    with pytest.raises(RuntimeError, match=message), capture_cls_attention(model):
        model(images_for(model).requires_grad_())


@pytest.mark.parametrize(("where", "name"), [("around", "registers"), ("inside", "registers"), ("around", "dhvt")])
def test_compile(where, name):
    """aot_eager traces all that inductor would: the graphs, the guards and the backward."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = build(name)
    backend = CompileCounterWithBackend("aot_eager")

    def step(images, model):
        with capture_cls_attention(model) as captured:
            logits = model(images)
        return logits.sum() + sum((i + 1) * m.square().sum() for i, m in enumerate(captured.maps))

    capture = capture_cls_attention(model)

    def compiled_step(images):
        if where == "around":
            return step(images, compiled)
        with capture:
            logits = model(images)
        return logits.sum() + sum((i + 1) * m.square().sum() for i, m in enumerate(capture.maps))

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    run = compiled_step if where == "around" else torch.compile(compiled_step, backend=backend, fullgraph=True)
    for seed in range(3):
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        results = []
        for f in (lambda x: step(x, model), run):
            model.zero_grad()
            loss = f(images)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
        close(*results, rtol=1e-9, atol=1e-11)
    assert backend.frame_count <= 2
    if where == "around":  # without the context the model is compiled without it
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-9, atol=1e-11)


def test_compile_with_checkpointing_says_that_it_cannot():
    torch._dynamo.reset()
    model = build("vit")
    model.set_grad_checkpointing(True)

    @torch.compile(backend="aot_eager")
    def step(images):
        with capture_cls_attention(model) as captured:
            model(images)
        return captured.stacked()

    with pytest.raises(RuntimeError, match="checkpointing inside of a compiled function"):
        step(images_for(model))


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(find_unused_parameters, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = build("vit")
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain), find_unused_parameters=find_unused_parameters)
        images, results = images_for(plain), []
        for m in (plain, model):
            with capture_cls_attention(m) as captured:
                logits = m(images)
            (logits.sum() + sum(x.square().sum() for x in captured.maps)).backward()
            results.append([*captured.maps, *(p.grad for p in m.parameters())])
        close(*results, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def unfused(model):
    model.blocks[1].attn.fused_attn = False
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: build("vit", class_token=False, global_pool="avg"), {}, "model must have a class token"),
        (lambda: timm.create_model("resnet10t"), {}, "model must have a class token; ResNet has none"),
        (lambda: timm.create_model("resnet10t"), {"num_prefix_tokens": 1}, "model must have attention layers"),
        (lambda: unfused(build("vit")), {}, r"fused attention on, and blocks\.1\.attn\.fused_attn is False"),
        (lambda: build("vit"), {"over": "tokens"}, "over must be 'patches' or 'all', got 'tokens'"),
        (lambda: build("vit"), {"scale": float("inf")}, "scale must be a finite number"),
        (lambda: build("vit"), {"num_prefix_tokens": 0}, "num_prefix_tokens must be at least 1"),
        (lambda: build("vit", patch_drop_rate=0.5), {}, "model must keep all patches"),
    ],
)
def test_models_and_arguments_that_do_not_fit(model, options, message):
    with pytest.raises(ValueError, match=message), capture_cls_attention(model(), **options):
        pass


def test_dropped_patches_matter_in_training_alone():
    model = build("vit", patch_drop_rate=0.5).eval()
    images = images_for(model)
    with capture_cls_attention(model) as captured:
        model(images)
    close(captured.maps, unfused_rows(model, images, 1, "patches"))


def test_layers_without_one_map_say_so():
    model = build("vit")
    images = images_for(model)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn has a causal mask"), capture_cls_attention(model):
        model.blocks[0].attn(torch.randn(1, 17, 24, dtype=torch.float64), is_causal=True)
    differential = timm.create_model("vit_dpwee_patch16_reg1_gap_256", class_token=True, depth=1, img_size=32)
    with pytest.raises(RuntimeError, match="attends more than once"), capture_cls_attention(differential):
        differential(torch.randn(1, 3, 32, 32))
    message = r"do not fill a grid of VisionTransformer, \(4, 4\)"
    with pytest.raises(RuntimeError, match=message), capture_cls_attention(model, num_prefix_tokens=2):
        model(images)


def test_masks_are_in_the_row():
    model = build("vit")
    attn, x = model.blocks[0].attn, torch.randn(1, 17, 24, dtype=torch.float64)
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[0, 5] = False
    with capture_cls_attention(model) as captured:
        attn(x, attn_mask=mask)
    assert captured.maps[0][..., 4].eq(0).all()
    with capture_cls_attention(model) as free:
        attn(x)
    others = [i for i in range(16) if i != 4]
    rest = free.maps[0][..., others]
    torch.testing.assert_close(captured.maps[0][..., others], rest / rest.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_data_parallel_threads_give_no_maps():
    import threading

    model = build("vit")
    with capture_cls_attention(model) as captured:
        thread = threading.Thread(target=lambda: F.relu(model(images_for(model))))
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError, match="or not in its thread"):
        captured.maps  # noqa: B018
