"""DeepSeek V2 and V3: latent attention, leading dense layers, shared and routed experts."""

from __future__ import annotations

from vramplan.models.architecture import LatentAttention
from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.moe import Mixture


class DeepseekV3(Mixture):
    """models/deepseek_v3/modeling_deepseek_v3.py"""

    @property
    def latent(self) -> LatentAttention:
        latent = self.arch.latent
        assert latent is not None
        return latent

    def slides(self, layer: int) -> bool:
        return False

    def buffers(self) -> None:
        super().buffers()
        experts = self.figures
        for layer in range(self.arch.layers):
            if not self.dense(layer):
                name = f"{self.layers_name}.{layer}.mlp.gate.e_score_correction_bias"
                self.g.buffer(name, experts.count, "fp32")

    # -- attention ----------------------------------------------------------------------------
    def attention(self, x: Tensor, name: str) -> Tensor:
        arch, latent, g = self.arch, self.latent, self.g
        nope, rope, value = latent.nope_head_dim, latent.rope_head_dim, latent.value_head_dim
        q = self.heads(self.project_queries(x, name))
        q_pass, q_rot = q.split((nope, rope))
        rank = latent.key_value_rank
        compressed = g.linear(
            x, f"{name}.kv_a_proj_with_mqa", arch.hidden_size, rank + rope, arch.attention_bias
        )
        kv, k_rot = compressed.split((rank, rope))
        kv = self.norm(kv, f"{name}.kv_a_layernorm", rank)
        q_rot, k_rot = self.rotate(q_rot, k_rot)
        q_states = g.join(q_pass, q_rot)
        k_states, v_states = self.expand_kv(kv, k_rot, name)
        out = self.attend(q_states, k_states, v_states)
        width = arch.heads * value
        out = g.linear(out, f"{name}.o_proj", width, arch.hidden_size, arch.output_bias)
        return out

    def project_queries(self, x: Tensor, name: str) -> Tensor:
        arch, latent, g = self.arch, self.latent, self.g
        width, rank = arch.heads * arch.head_dim, latent.query_rank
        if rank is None:
            return g.linear(x, f"{name}.q_proj", arch.hidden_size, width)
        return g.linear(
            self.norm(
                g.linear(x, f"{name}.q_a_proj", arch.hidden_size, rank, arch.attention_bias),
                f"{name}.q_a_layernorm",
                rank,
            ),
            f"{name}.q_b_proj",
            rank,
            width,
        )

    def expand_kv(self, kv: Tensor, k_rot: Tensor, name: str) -> tuple[Tensor, Tensor]:
        arch, latent, g = self.arch, self.latent, self.g
        nope, value = latent.nope_head_dim, latent.value_head_dim
        width = arch.heads * (nope + value)
        kv = self.heads(g.linear(kv, f"{name}.kv_b_proj", latent.key_value_rank, width))
        k_nope, v_states = kv.split((nope, value))
        k_rot = g.spread(k_rot, arch.heads)
        return g.assemble(k_nope, k_rot), v_states

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.arch.figure("interleaved"):
            return self.rotary(q, k)
        _, cos, sin = self.tables
        cos, sin = cos.slice(1, 2), sin.slice(1, 2)
        q1, q2 = q.slice(1, 2), q.slice(1, 2)
        k1, k2 = k.slice(1, 2), k.slice(1, 2)
        q_embed = self.g.cat([(q1 * cos).minus(q2 * sin), q2 * cos + q1 * sin])
        k_embed = self.g.cat([(k1 * cos).minus(k2 * sin), k2 * cos + k1 * sin])
        return q_embed, k_embed

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arch, g, value = self.arch, self.g, self.latent.value_head_dim
        if g.policy.attention == "eager":
            return self.eager(q, k, v)
        if g.policy.attention == "flash_attention_2" and value != arch.head_dim:
            return g.padded_flash(q, k, v, arch.heads, arch.head_dim, value)
        return g.fused_attention(
            q,
            k,
            v,
            self.mask,
            arch.heads,
            arch.heads,
            arch.head_dim,
            value,
            dropout=arch.dropouts.attention,
        )

    # -- feed-forward -------------------------------------------------------------------------
    def mixture(self, x: Tensor, name: str) -> Tensor:
        experts = self.figures
        residuals = x
        _logits, weights, index = self.route(x, f"{name}.gate")
        x = self.g.experts(x, index, weights, self.stack(f"{name}.experts"), self.apply_gate)
        x = x + self.plain_mlp(residuals, f"{name}.shared_experts", experts.shared_width)
        return x

    def route(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        g, arch, experts = self.g, self.arch, self.figures
        logits = self.router_logits(x, name, wide=True)
        scores = logits.sigmoid()
        for_choice = g.corrected(scores, experts.count)
        for_choice = g.limit_groups(
            for_choice, experts.count, experts.groups, arch.figure("active_groups"), 2
        )
        index = g.topk(for_choice, experts.active, experts.count)[1]
        weights = g.gather(scores, index)
        if arch.figure("normalizes"):
            denominator = g.total(weights, experts.active).shift()
            weights = g.divide_(weights, denominator)
        weights = weights * 1.0
        return logits, weights, index


class DeepseekV2(DeepseekV3):
    """models/deepseek_v2/modeling_deepseek_v2.py: complex rotation, softmax routing."""

    def buffers(self) -> None:
        super(DeepseekV3, self).buffers()

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = self.g.causal_mask(x)
        return (mask, None, self.g.frequencies(self.arch.rotary_dim), None)

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        g, frequencies = self.g, self.tables[1]
        wide_q, wide_k = q.float(), k.float()
        q_out = g.rotate_complex(wide_q, frequencies, q.dtype)
        k_out = g.rotate_complex(wide_k, frequencies, k.dtype)
        return q_out, k_out

    def route(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        g, arch, experts = self.g, self.arch, self.figures
        logits = self.router_logits(x, name, wide=True)
        scores = logits.softmax("fp32")
        if arch.figure("group_limited"):
            scores = g.limit_groups(
                scores, experts.count, experts.groups, arch.figure("active_groups"), 1
            )
        weights, index = g.topk(scores, experts.active, experts.count)
        weights = weights * 1.0
        return logits, weights, index
