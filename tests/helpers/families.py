"""Which tiny models there are. tests/architectures/test_all_*.py check the promises for each."""

from __future__ import annotations

from typing import Any

TEXT_FAMILIES = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet"]
IMAGE_FAMILIES = ["vit", "deit", "timm-vit"]
ALL = [*TEXT_FAMILIES, *IMAGE_FAMILIES]

BLOCKS, HEADS, WIDTH, INNER = 3, 4, 32, 64
IMAGE_SIZE, PATCH_SIZE = 32, 8
MAX_LENGTH = 64
TIMM_NAME = "vit_tiny_patch16_224"

_LAYERS = {"num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "hidden_size": WIDTH}
_IMAGE = {**_LAYERS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
_TOWER = {**_IMAGE, "intermediate_size": INNER, "projection_dim": 16}
# a CLIP text model reads its embedding at the highest id when `eos_token_id` is 2
_TEXT_TOWER = {
    **_LAYERS, "intermediate_size": INNER, "projection_dim": 16, "max_position_embeddings": MAX_LENGTH,
    "vocab_size": 80, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
# text without types and with more words than the tokenizer knows
_TEXT = {
    **_LAYERS, "intermediate_size": INNER, "max_position_embeddings": MAX_LENGTH, "vocab_size": 100, "pad_token_id": 0,
    "num_labels": 2,
}  # fmt: skip
_DEBERTA = {**_TEXT, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
# 8 x 8 tokens, then 4 x 4: windows are shifted, and windows of 3 padded as well
_SWIN = {
    "image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": WIDTH, "depths": [2, 2], "num_heads": [HEADS] * 2,
    "mlp_ratio": 2.0, "num_labels": 5,
}  # fmt: skip
_STAGES = ["stage1", "stage2", "stage3", "stage4"]
# 16 x 16 positions, then 8 x 8, 4 x 4, 2 x 2: windows of 3 are padded
_BACKBONE_SWIN = {
    "model_type": "swin", "image_size": IMAGE_SIZE, "patch_size": 2, "embed_dim": 16, "depths": [2, 1, 1, 1],
    "num_heads": [HEADS] * 4, "window_size": 3, "mlp_ratio": 2.0, "out_features": _STAGES,
}  # fmt: skip
_BACKBONE_RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 24, 32, 48], "depths": [2, 1, 1, 1],
    "out_features": _STAGES,
}  # fmt: skip
_MASK2FORMER = {
    "feature_size": WIDTH, "mask_feature_size": WIDTH, "hidden_dim": WIDTH, "num_attention_heads": HEADS,
    "encoder_layers": 2, "encoder_feedforward_dim": INNER, "decoder_layers": 3, "dim_feedforward": INNER,
    "num_queries": 7, "num_labels": 5,
}  # fmt: skip
_MASKFORMER = {
    "fpn_feature_size": WIDTH, "mask_feature_size": WIDTH, "num_labels": 5,
    "decoder_config": {
        "model_type": "detr", "d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": HEADS,
        "decoder_ffn_dim": INNER, "num_queries": 7,
    },
}  # fmt: skip
IMAGE_SIZES = {"mask2former-resnet": 64, "maskformer-resnet": 64}
"""Sizes of the images of those that would have no map left of the usual ones."""
_DECODER = {
    **_LAYERS, "vocab_size": 80, "max_position_embeddings": MAX_LENGTH, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 3,
}  # fmt: skip
_GROUPED = {  # two heads of queries to each of keys and values: as many units as the others have
    **_DECODER, "num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "intermediate_size": INNER,
    "head_dim": WIDTH // (2 * HEADS),
}  # fmt: skip
_ONE_GROUP = {
    **_GROUPED, "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": WIDTH // HEADS
}  # fmt: skip
"""All heads of queries read one of keys and values, as in Gemma 3 270M: each is a unit."""
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {**_DECODER, "n_inner": INNER}),
    "llama": ("LlamaForCausalLM", {**_GROUPED, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "gemma": ("GemmaForCausalLM", _GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 4}),
    "gemma3-one-group": ("Gemma3ForCausalLM", {**_ONE_GROUP, "sliding_window": 4}),
    "opt": ("OPTForCausalLM", {**_DECODER, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**_DECODER, "intermediate_size": INNER}),
    "phi": ("PhiForCausalLM", {**_GROUPED, "partial_rotary_factor": 0.5}),
}
_T5 = {
    "vocab_size": 80, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": INNER, "num_layers": BLOCKS,
    "num_heads": HEADS, "relative_attention_num_buckets": 8, "pad_token_id": 0, "eos_token_id": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5-gated": (
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2},
    ),
}
_BART = {
    "vocab_size": 80, "d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER, "max_position_embeddings": MAX_LENGTH, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None,
}  # fmt: skip
_BERT_PART = {
    **_LAYERS, "model_type": "bert", "intermediate_size": INNER, "max_position_embeddings": MAX_LENGTH,
    "vocab_size": 80, "pad_token_id": 0,
}  # fmt: skip
ENCODER_DECODERS |= {
    "bart": ("BartForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", {**_BART, "tie_word_embeddings": True}),
    "m2m-100": ("M2M100ForConditionalGeneration", _BART),
    "bert-to-bert": (
        "EncoderDecoderModel",
        {
            "encoder": _BERT_PART, "decoder": {**_BERT_PART, "is_decoder": True, "add_cross_attention": True},
            "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "vocab_size": 80,
        },
    ),
}  # fmt: skip
_WHISPER = {
    "vocab_size": 80, "d_model": WIDTH, "encoder_layers": BLOCKS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "num_mel_bins": 8,
    "max_source_positions": 50, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    "decoder_start_token_id": 2,
}  # fmt: skip
WHISPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "whisper": ("WhisperForConditionalGeneration", {**_WHISPER, "decoder_layers": BLOCKS}),
    "whisper-classifier": (
        "WhisperForAudioClassification",
        {**_WHISPER, "classifier_proj_size": 16, "num_labels": 2},
    ),
    "whisper-all-blocks": (
        "WhisperForAudioClassification",
        {**_WHISPER, "classifier_proj_size": 16, "num_labels": 2, "use_weighted_layer_sum": True},
    ),
}
MORE_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    **DECODERS,
    **ENCODER_DECODERS,
    **WHISPERS,
    "beit": (
        "BeitForImageClassification",
        {**_IMAGE, "intermediate_size": INNER, "num_labels": 5, "use_relative_position_bias": True},
    ),
    "beit-shared": (
        "BeitForImageClassification",
        {
            **_IMAGE, "intermediate_size": INNER, "num_labels": 5, "use_relative_position_bias": True,
            "use_shared_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.0,
        },
    ),
    "dinov2": ("Dinov2ForImageClassification", {**_IMAGE, "mlp_ratio": 2, "num_labels": 5}),
    "dinov2-swiglu": (
        "Dinov2ForImageClassification", {**_IMAGE, "mlp_ratio": 3, "num_labels": 5, "use_swiglu_ffn": True}
    ),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification", {**_IMAGE, "mlp_ratio": 2, "num_labels": 5}
    ),
    "clip-vision": ("CLIPVisionModel", _TOWER),
    "clip-vision-projected": ("CLIPVisionModelWithProjection", _TOWER),
    "clip-image-classifier": (
        "CLIPForImageClassification",
        {"vision_config": _TOWER, "text_config": _TEXT_TOWER, "num_labels": 5},
    ),
    "clip-text": ("CLIPTextModel", _TEXT_TOWER),
    "clip-text-projected": ("CLIPTextModelWithProjection", _TEXT_TOWER),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "image_size": IMAGE_SIZE, "num_labels": 5,
         "num_stages": 3},
    ),
    "deberta": ("DebertaForSequenceClassification", {**_DEBERTA, "max_relative_positions": -1}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification", {**_DEBERTA, "position_buckets": -1, "share_att_key": False}
    ),
    "deberta-v3": (
        "DebertaV2ForSequenceClassification",
        {**_DEBERTA, "position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm",
         "position_biased_input": False},
    ),
    "albert": ("AlbertForSequenceClassification", {**_TEXT, "embedding_size": 16}),
    "albert-groups": (
        "AlbertForSequenceClassification",
        {**_TEXT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {**_TEXT, "local_attention": 6, "global_attn_every_n_layers": 2, "bos_token_id": 2, "eos_token_id": 3,
         "cls_token_id": 2, "sep_token_id": 3},
    ),
    # 16 x 16 positions, then 8 x 8 and 4 x 4; keys and values of a sixteenth, a quarter and all of them
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"num_encoder_blocks": 3, "depths": [1, 2, 1], "sr_ratios": [4, 2, 1], "hidden_sizes": [16, 32, 48],
         "patch_sizes": [7, 3, 3], "strides": [2, 2, 2], "num_attention_heads": [4, 4, 4], "mlp_ratios": [2, 2, 2],
         "decoder_hidden_size": 16, "num_labels": 5},
    ),
    "mask2former-swin": (
        "Mask2FormerForUniversalSegmentation", {**_MASK2FORMER, "backbone_config": _BACKBONE_SWIN}
    ),
    "mask2former-resnet": (
        "Mask2FormerForUniversalSegmentation",
        {**_MASK2FORMER, "backbone_config": {**_BACKBONE_RESNET, "layer_type": "bottleneck"}},
    ),
    "maskformer-swin": (
        "MaskFormerForInstanceSegmentation", {**_MASKFORMER, "backbone_config": _BACKBONE_SWIN}
    ),
    "maskformer-resnet": (
        "MaskFormerForInstanceSegmentation",
        {**_MASKFORMER, "backbone_config": {**_BACKBONE_RESNET, "layer_type": "basic"}},
    ),
    "swin": ("SwinForImageClassification", {**_SWIN, "window_size": 4}),
    "swin-padded": ("SwinForImageClassification", {**_SWIN, "window_size": 3}),
    "swinv2": ("Swinv2ForImageClassification", {**_SWIN, "window_size": 3}),
}  # fmt: skip
MORE_TEXT = [
    "clip-text",
    "clip-text-projected",
    "deberta",
    "deberta-v2",
    "deberta-v3",
    "modernbert",
    "albert",
    "albert-groups",
]
"""Of them, those that read text."""
MORE_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm-deit-distilled": ("deit_tiny_distilled_patch16_224", {}),
    "timm-deit3": ("deit3_small_patch16_224", {}),  # layer scale
    "timm-clip": ("vit_base_patch32_clip_224", {}),  # norm_pre
    "timm-post-norm": ("vit_base_patch16_rpn_224", {}),  # ResPostBlock, no class token, average pooling
    "timm-registers": ("vit_medium_patch16_reg4_gap_256", {"qk_norm": True}),
    "timm-swiglu": ("vit_giant_patch14_reg4_dinov2", {}),  # gate and value packed
    "timm-eva-rope": ("vit_small_patch16_rope_224", {}),
    "timm-eva-mixed": ("vit_small_patch16_rope_mixed_224", {"qkv_fused": False}),  # a rotation for each head
    "timm-eva02": ("eva02_tiny_patch14_224", {}),
    "timm-dinov3": ("vit_small_plus_patch16_dinov3", {}),  # gate and value apart
    "timm-beit": ("beit_base_patch16_224", {}),
    "timm-swin": ("swin_tiny_patch4_window7_224", {}),
    "timm-swin-padded": ("swin_tiny_patch4_window7_224", {"window_size": 3, "head_dim": 6}),
    "timm-swinv2": ("swinv2_tiny_window8_256", {}),
}
TIMM_CNNS = {
    "timm-resnet": "test_resnet",  # a basic block in a stage, a bottleneck in the next
    "timm-efficientnet": "test_efficientnet",  # fused and plain inverted residuals, squeeze-and-excite
    "timm-convnext": "test_convnext",
    "timm-vgg-bn": "vgg_tiny_bn",
    "timm-vgg": "vgg_tiny",
}
"""timm's own tiny models, and those of helpers/vgg.py."""
TORCHVISION: dict[str, tuple[str, dict[str, Any]]] = {
    "torchvision-mobilenet-v2": (
        "mobilenet_v2",
        {"inverted_residual_setting": [[1, 8, 1, 1], [3, 12, 2, 2]], "width_mult": 0.5},
    ),
    "torchvision-vgg": ("torchvision_vgg_tiny", {}),
}
CNNS = [*TIMM_CNNS, *TORCHVISION, "convnext"]
SEGMENTERS = ["segformer", "mask2former-swin", "mask2former-resnet", "maskformer-swin", "maskformer-resnet"]
MORE_FAMILIES = [*MORE_TRANSFORMERS, *MORE_TIMM, *TIMM_CNNS, *TORCHVISION]
"""Further families and variants; tests/architectures/test_all_*.py check the promises for each."""

# rotary positions, norms of queries and keys, grouped keys, cosines, or terms of positions in the logits
WHOLE = {
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gemma3-one-group", "gpt-neox", "phi",
    "modernbert", "deberta", "deberta-v2", "deberta-v3", "swinv2", "timm-registers", "timm-eva-rope", "timm-eva-mixed",
    "timm-eva02", "timm-dinov3", "timm-beit", "timm-swinv2",
}  # fmt: skip
UNSAID = {*CNNS, "mask2former-resnet", "maskformer-resnet"}
RANKED = [name for name in (*ALL, *MORE_FAMILIES) if name not in WHOLE | UNSAID]
"""Families whose heads can be cut to a lower rank."""
