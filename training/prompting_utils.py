"""The published module of this name, for scripts that import it: docs/migrating.md."""

from models.compat import (  # noqa: F401
    UniversalPrompting,
    create_attention_mask_for_mmu,
    create_attention_mask_for_mmu_vit,
    create_attention_mask_predict_next,
)
