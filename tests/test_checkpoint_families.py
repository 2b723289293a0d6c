"""Every family of the table against the module of transformers: saved by it, loaded without it."""

import shutil

import numpy as np
import pytest
from support import assert_close

import cumoe
from cumoe.checkpoint.config import ALIASES, Key
from cumoe.checkpoint.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")

from checkpoint_oracles import STORED, make, run  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers_models import MODELS, build  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other libraries


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that gives (folder of the checkpoints, x, input_ids, y of the module), made once a model."""
    made = {}
    transformers.utils.logging.disable_progress_bar()

    def save(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            make(folder, name, MODELS[name])
            module = np.load(folder / "module.npz")
            made[name] = folder, module["x"], module.get("input_ids"), module["y"]
        return made[name]

    return save


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_layer_is_the_module(backend, saved, name, dtype):
    """In float64. So no near tie of a rounded router decides about an expert."""
    folder, *_ = saved(name)
    got, expected = run(folder, dtype, backend)
    assert_close(got, expected, dtype, name)


@pytest.mark.parametrize("name", [
    "axk1", "aria", "dbrx", "deepseek_v3", "deepseek_v4", "exaone_moe", "granitemoeshared", "hy_v4", "kimi_linear",
    "longcat_flash", "minimax_m2", "minimax_m3_vl", "mixtral", "nemotron_h", "phimoe", "qwen2_moe", "step3p7",
])  # fmt: skip
def test_the_names_of_the_modules_do_as_well(saved, tmp_path, name):
    """As transformers saves them where it does not go back to the names of the original checkpoints."""
    _, x, ids, y = saved(name)
    build(MODELS[name], name).save_pretrained(tmp_path, save_original_format=False)
    layer = cumoe.load(tmp_path, MODELS[name].layer, device="cpu")
    assert_close(layer(x, input_ids=ids), y, np.float32, name)


def test_packed_weights_in_either_order(saved, tmp_path):
    """Hub checkpoints of Qwen3-VL-MoE hold (E, hidden, 2I), transformers writes (E, 2I, hidden)."""
    folder, x, ids, y = saved("qwen3_vl_moe")
    tensors = load_file(folder / "float32" / "model.safetensors")
    swapped = {
        name: np.ascontiguousarray(array.swapaxes(1, 2)) if "experts" in name else array
        for name, array in tensors.items()
    }
    assert any(swapped[name].shape != array.shape for name, array in tensors.items())
    save_file(swapped, tmp_path / "model.safetensors")
    shutil.copy(folder / "float32" / "config.json", tmp_path)
    assert_close(cumoe.load(tmp_path, 1, device="cpu")(x, input_ids=ids), y, np.float32)


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "hunyuan_v1_moe", "nemotron_h", "lfm2_moe"])
def test_what_a_family_keeps_in_float32_stays_float32(saved, name):
    """Router weights and correction biases of a model that was loaded and saved in bfloat16."""
    folder, *_ = saved(name)
    layer = cumoe.load(folder / "bfloat16", MODELS[name].layer, device="cpu")
    arrays = cumoe.load(folder / "float32", MODELS[name].layer, device="cpu")
    if layer.router.selection_bias is not None:
        np.testing.assert_array_equal(layer.router.selection_bias, arrays.router.selection_bias)
    if name in ("ernie4_5_moe", "hunyuan_v1_moe"):
        assert layer.router_weight.dtype == np.float32
    np.testing.assert_array_equal(layer.router_weight.astype(np.float32), arrays.router_weight)


def test_every_family_has_an_oracle():
    """Itself or, where only the name differs, another with the same entry."""
    tested = {name.split("+")[0] for name in MODELS} | {model.text_type for model in MODELS.values()}
    entries = [FAMILIES[name] for name in tested if name in FAMILIES]
    assert not [name for name, family in FAMILIES.items() if not any(family is entry for entry in entries)]


def keys_of(value):
    """Yield the keys in an entry of the table, or in a part of one."""
    if isinstance(value, Key):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from keys_of(item)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_configuration_class(family):
    """A value that config.json leaves out is what transformers would take."""
    for model_type in (family + "_text", family):
        if model_type in CONFIG_MAPPING:
            config = CONFIG_MAPPING[model_type]()
            break
    else:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    values = vars(getattr(config, "text_config", config)) | vars(getattr(config, "ffn_config", None) or config)
    compared = 0
    for key in keys_of(dict(vars(FAMILIES[family]))):
        names = [name for name in (key.name, *ALIASES.get(key.name, ())) if values.get(name) is not None]
        if key.default is None or not names or isinstance(values[names[0]], list):
            continue
        assert values[names[0]] == key.default or (key.name == "n_shared_experts" and values[names[0]]), (key, names)
        compared += 1
    assert compared
