"""The public names of Show-o's models."""

from models.clip_encoder import CLIPVisionTower
from models.compat import get_mask_chedule
from models.generation.sampling import SamplingParameters, get_mask_schedule
from models.modeling_magvitv2 import MAGVITv2, MAGVITv2Config
from models.modeling_showo import Showo, ShowoConfig
from models.omni_attention import OmniMask
from models.pipeline_showo import ShowoPipeline
from models.prompting import UniversalPrompting

__all__ = [
    "CLIPVisionTower",
    "MAGVITv2",
    "MAGVITv2Config",
    "OmniMask",
    "SamplingParameters",
    "Showo",
    "ShowoConfig",
    "ShowoPipeline",
    "UniversalPrompting",
    "get_mask_chedule",
    "get_mask_schedule",
]
