#pragma once

struct ggml_compute_params;
struct ggml_tensor;

// Compute a node GGML_OP_FLASH_ATTN_EXT, or return false if its types or options are not supported.
bool compute_attention(const ggml_compute_params * params, ggml_tensor * dst);
