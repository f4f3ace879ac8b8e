"""The space that images and texts share: two projections, the fusion block, and their contrastive loss.

    prefix tokens (R, P, D)    -> mean -> embed_image -> (R, projection)
    token embeddings (R, T, D) -> mean -> embed_text  -> (R, projection)
    both                       -> MicroVLMFusion      -> does the text belong to the image? (R,)

R rows of a batch have both an image and a text. The text side reads token *embeddings*: a hidden state of the decoder
has seen the image and would give the answer away.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_microvlm import require
from .quantization_microvlm import present


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) of R pairs of unit vectors (R, C): the mean loss (), float32."""
    similarity = image_embeds.float() @ text_embeds.float().mT / temperature  # (R, R)
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.mT, target)) / 2


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average (R, T, C) over the positions where mask (R, T) is set; every row needs one."""
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1)


class MicroVLMFusionLayer(nn.Module):
    """Pre-norm cross-attention of text over prefix tokens, then an MLP."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, text: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        with present(self.attention):  # which reads the weights of its parts itself
            text = text + self.attention(self.norm1(text), prefix, prefix, need_weights=False)[0]
        return text + self.fc2(F.gelu(self.fc1(self.norm2(text))))


class MicroVLMFusion(nn.Module):
    """Judge whether a text belongs to an image (image-text matching, ALBEF, arXiv 2107.07651)."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int):
        super().__init__()
        self.layers = nn.ModuleList([MicroVLMFusionLayer(hidden_size, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(hidden_size)
        self.match = nn.Linear(hidden_size, 1)

    def forward(self, text: torch.Tensor, text_mask: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Logits (R,) for texts (R, T, D) with mask (R, T) and prefix tokens (R, P, D)."""
        for layer in self.layers:
            text = layer(text, prefix)
        return self.match(masked_mean(self.norm(text), text_mask)).squeeze(-1)


class MicroVLMAlignment(nn.Module):
    """Project pooled prefix tokens and pooled text embeddings (R, D) to unit vectors (R, projection)."""

    def __init__(self, hidden_size: int, projection_size: int):
        super().__init__()
        self.image_norm = nn.LayerNorm(hidden_size)
        self.image_proj = nn.Linear(hidden_size, projection_size)
        self.text_norm = nn.LayerNorm(hidden_size)
        self.text_proj = nn.Linear(hidden_size, projection_size)

    def embed_image(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image_proj(self.image_norm(pooled)), dim=-1)

    def embed_text(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text_proj(self.text_norm(pooled)), dim=-1)


class AlignmentMixin:
    """Align the images and texts of a batch: the part of `MicroVLMModel`."""

    def check_alignment(self, kind: bool | str | None, use_fusion: bool | None, input_ids, has_images: bool) -> None:
        """Refuse an alignment that a call cannot have: `kind` is its `return_alignment`."""
        known = kind in (None, False, True, "only")
        require(known, "return_alignment must be True, False or 'only', got {!r}.", kind)
        no_block = "use_fusion=True needs a model built with config.use_fusion=True; this one has no block."
        require(not use_fusion or self.fusion is not None, no_block)
        require(kind != "only" or has_images, "return_alignment='only' needs images: give pixel_values.")
        require(not kind or not has_images or input_ids is not None, "return_alignment needs input_ids.")

    def get_alignment(
        self,
        input_ids: torch.LongTensor,
        image_hidden_states: torch.FloatTensor,
        labels: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        use_fusion: bool | None,
    ) -> dict[str, torch.Tensor]:
        """Embed the images and texts of the R rows that have both in the shared space.

        Args:
            input_ids: (B, T), with P placeholders per image.
            image_hidden_states: prefix tokens (N, P, D).
            labels: (B, T), -100 where the text is not a description of the row's images; None: all of it is.
            attention_mask: (B, T).
            use_fusion: also return `match_logits` (R, 2); default: the config's.
        """
        text_mask = labels != -100 if labels is not None else input_ids != self.config.image_token_id
        if attention_mask is not None:
            text_mask = text_mask & attention_mask.bool()
        # rows with an image and a text
        per_row = self.count_images(input_ids)  # (B,)
        owner = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(per_row)  # (N,)
        rows = torch.nonzero((per_row > 0) & text_mask.any(1)).flatten()  # (R,)
        # several images of a row: their mean, (R, P, D)
        shape = (len(input_ids), *image_hidden_states.shape[1:])
        prefix = image_hidden_states.new_zeros(shape).index_add(0, owner, image_hidden_states)[rows]
        prefix = prefix / per_row[rows].view(-1, 1, 1)
        # both in the shared space
        text, mask = self.get_input_embeddings()(input_ids)[rows], text_mask[rows]  # (R, T, D), (R, T)
        image_embeds = self.alignment.embed_image(prefix.mean(1))
        text_embeds = self.alignment.embed_text(masked_mean(text, mask))
        outputs = {"image_embeds": image_embeds, "text_embeds": text_embeds}
        # judge each text with its own image, and with the most similar other one
        if (self.config.use_fusion if use_fusion is None else use_fusion) and len(rows) > 1:
            similarity = (text_embeds @ image_embeds.mT).detach()  # (R, R)
            hardest = similarity.fill_diagonal_(-torch.inf).argmax(1)
            logits = [self.fusion(text, mask, prefix), self.fusion(text, mask, prefix[hardest])]
            outputs["match_logits"] = torch.stack(logits, dim=-1)
        return outputs
