"""The configurations of the tiny checkpoints, each with its ``model_type``."""

from __future__ import annotations

from tests import checkpoints as tiny

V1 = {**tiny.DEEPSEEK, "model_type": "deepseek"}
V2 = {**tiny.DEEPSEEK_V2, "model_type": "deepseek_v2"}
LITE = {**tiny.DEEPSEEK_V2_LITE, "model_type": "deepseek_v2"}
V3 = {**tiny.DEEPSEEK_V3, "model_type": "deepseek_v3"}
V32 = {**tiny.DEEPSEEK_V32, "model_type": "deepseek_v32"}
MIX = {**tiny.MIXTRAL, "model_type": "mixtral"}
QWEN3 = {**tiny.QWEN3_MOE, "model_type": "qwen3_moe"}
QWEN2 = {**tiny.QWEN2_MOE, "model_type": "qwen2_moe"}
OLMOE = {**tiny.OLMOE, "model_type": "olmoe"}
GLM = {**tiny.GLM4_MOE, "model_type": "glm4_moe"}
ALL = [V1, V2, LITE, V3, V32, MIX, QWEN3, QWEN2, OLMOE, GLM]
