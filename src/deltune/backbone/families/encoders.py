"""Rows of text encoders."""

from __future__ import annotations

from dataclasses import replace

from deltune.backbone.families.rows import AttentionRow, Family, FeedForwardRow, Fused, StackRow, TokenRow

__all__ = ["BERT", "ENCODERS"]


def _bert_attention(block: str) -> AttentionRow:
    return AttentionRow(
        block=f"{block}.self",
        query=f"{block}.self.query",
        key=f"{block}.self.key",
        value=f"{block}.self.value",
        output=f"{block}.output.dense",
        result=f"{block}.output.dropout",
        norm_after=f"{block}.output.LayerNorm",
    )


#: The row that many encoders follow.
BERT = StackRow(
    name="encoder",
    layers="encoder.layer",
    embeddings="embeddings.word_embeddings",
    attention=_bert_attention("attention"),
    ffn=FeedForwardRow(
        up="intermediate.dense", down="output.dense", result="output.dropout", norm_after="output.LayerNorm"
    ),
    norms=("attention.output.LayerNorm", "crossattention.output.LayerNorm", "output.LayerNorm"),
    outer_norms=("embeddings.LayerNorm",),
    cross=_bert_attention("crossattention"),
    # The pooler reads position 0 of the encoder's output, so additional positions go before it.
    tokens=TokenRow(exit="encoder", table="embeddings.position_embeddings"),
)

_ROBERTA = replace(BERT, tokens=TokenRow(exit="encoder", table="embeddings.position_embeddings", after_padding=True))

_DISTILBERT = StackRow(
    name="encoder",
    layers="transformer.layer",
    embeddings="embeddings.word_embeddings",
    attention=AttentionRow(
        block="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        result="attention.out_lin",
        norm_after="sa_layer_norm",
    ),
    ffn=FeedForwardRow(
        up="ffn.lin1", down="ffn.lin2", result="ffn.dropout", block="ffn", norm_after="output_layer_norm"
    ),
    norms=("sa_layer_norm", "output_layer_norm"),
    outer_norms=("embeddings.LayerNorm",),
    tokens=TokenRow(exit="transformer", table="embeddings.position_embeddings"),
)

# The layers of one group are shared: they run several times, one after the other. AlbertLayer.dropout is
# never called, so the feed-forward result is the linear map itself.
_ALBERT = StackRow(
    name="encoder",
    layers="encoder.albert_layer_groups.*.albert_layers",
    embeddings="embeddings.word_embeddings",
    attention=AttentionRow(
        block="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        result="attention.output_dropout",
        norm_after="attention.LayerNorm",
    ),
    ffn=FeedForwardRow(up="ffn", down="ffn_output", result="ffn_output", norm_after="full_layer_layer_norm"),
    norms=("attention.LayerNorm", "full_layer_layer_norm"),
    outer_norms=("embeddings.LayerNorm",),
    tokens=TokenRow(exit="encoder", table="embeddings.position_embeddings"),
    repeats=("num_hidden_layers", "num_hidden_groups"),
)

# `Wi` holds the half that passes through the activation first, which ModernBERT's code calls "input"; the
# half that it calls "gate" is multiplied as it is. The norm before the first attention is an identity.
_MODERNBERT = StackRow(
    name="encoder",
    layers="layers",
    embeddings="embeddings.tok_embeddings",
    attention=AttentionRow(
        block="attn",
        query=Fused("attn.Wqkv", "blocks", 0),
        key=Fused("attn.Wqkv", "blocks", 1),
        value=Fused("attn.Wqkv", "blocks", 2),
        output="attn.Wo",
        result="attn.out_drop",
        norm_before="attn_norm",
    ),
    ffn=FeedForwardRow(
        gate=Fused("mlp.Wi", "halves", 0),
        up=Fused("mlp.Wi", "halves", 1),
        down="mlp.Wo",
        result="mlp",
        block="mlp",
        norm_before="mlp_norm",
    ),
    norms=("attn_norm", "mlp_norm"),
    outer_norms=("embeddings.norm", "final_norm"),
    final_norm="final_norm",
    tokens=TokenRow(),
)

# DeBERTa computes attention itself. Where `share_att_key` is set, its query and key matrices also map the
# table of relative positions: they run twice in one forward pass.
_DEBERTA_V2 = replace(
    BERT,
    attention=replace(
        BERT.attention,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        dispatches=False,
    ),
    cross=None,
    outer_norms=("embeddings.LayerNorm", "encoder.LayerNorm", "encoder.conv.LayerNorm"),
)

ENCODERS: tuple[Family, ...] = (
    Family("bert", ("bert",), (BERT,), pretrained=("cls",)),
    Family("roberta", ("roberta", "xlm-roberta", "camembert"), (_ROBERTA,)),
    Family("distilbert", ("distilbert",), (_DISTILBERT,)),
    Family("electra", ("electra",), (BERT,), pretrained=("discriminator_predictions",)),
    Family("albert", ("albert",), (_ALBERT,)),
    # The checkpoints hold the prediction head, trained by masked language modelling; the classifier after it
    # alone is new.
    Family("modernbert", ("modernbert",), (_MODERNBERT,), pretrained=("head",)),
    # DeBERTa's pooler is beside its base model and in no checkpoint, so it is part of the task head.
    Family("deberta-v2", ("deberta-v2",), (_DEBERTA_V2,)),
)
