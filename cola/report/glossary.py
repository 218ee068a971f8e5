"""The words of the house, as a page explains them: at each table's head, and in a list at its foot."""

from collections.abc import Iterable

from cola.report.table import Table

WORDS = {
    "arm": "one way to adapt the base, trained and scored under every seed",
    "link": "one round of a chain: a fresh low-rank pair that is trained beside the frozen weights",
    "knot": "the joint after a link, where its pair is added to the weights (tied); ring in the figures",
    "claim": "a difference that was named before the run and is told from 0 at 5 %, secondary ones after Holm",
    "detectable": "the smallest true difference that such a study would find in four of five runs",
    "gap_loss": "test loss − train loss; a small gap beside a bad test number is underfitting",
    "gap_acc": "train score − test score; a small gap beside a bad test number is underfitting",
    "ft_gap": "score of full fine-tuning − the arm's, on test",
    "closed": "(arm − lora) / (full − lora), on test; undefined where full fine-tuning and LoRA cannot be told apart",
    "forgetting": "loss on the general text after training − before",
    "difference": "on test, paired by seed and example, from the arm's first value; more is better",
    "by optimizer": "FLOPs of all steps: products and decompositions. Of code of one's own that says none: not counted",
    "by starts": "FLOPs before the links' first steps: full gradients and decompositions",
    "optimizer state": "tensors that the optimizer keeps of a link, the largest",
    "wall clock": "of training, knots and scoring from the base on, whichever session did it, with all else that the "
    "machine did meanwhile in it: no finding. CPU time stands beside it where it was recorded",
    "CPU time": "of the same, of all threads of the process together: what else the machine did is not in it, and "
    "nor is what a GPU did",
    "± and [ ]": "one standard deviation over seeds; 95 % interval",
    "p": "as the interval: for other seeds and other test examples, with one seed for other examples alone (the level "
    "at which the interval ends at 0)",
    "p (Holm)": "of the secondary contrasts, corrected for their number",
    "p, these rows": "sign flips over runs, for other seeds on these test rows",
    "smallest, these rows": "the smallest that so many runs can reach",
    "resampled": "share of resampled trials that choose the same value: of validation rows, and of the trials' seeds "
    "where there are several; with one seed the share is too large",
    "merge": "how a knot ties: added to the untouched base (exact), in place (naive), or kept beside the weights",
    "cleared": "share of the optimizer's moments that were zero when the link began",
    "‖ΔW‖/‖W‖": "size of what was added by the base's weights, median of its matrices, before any rounding",
    "unchanged": "entries of a matrix that the knot left as they were in the base's number format",
    "error": "of all links so far as the weights hold them, against what was learned",
    "cosine": "between what the weights hold and what was learned",
    "logits": "largest change of a logit across the knot, on a few validation rows; rounding, unless it lets a part go",
    "of learned": "change of all logits across the knot as a share of the change that the link had learned",
    "KL": "divergence of the outputs across the knot, nats per token",
    "effective rank": "exp of the entropy of the singular values' shares",
    "rank at 90 %": "how many singular values hold 90 % of the energy",
    "stable rank": "‖ΔW‖²_F / ‖ΔW‖²₂",
    "intruders": "of the ten largest singular directions of the tuned weights, those that are like none of the base's",
    "random": "the overlap that two random subspaces of that size would have",
}
ALWAYS = ("arm", "link", "knot", "± and [ ]")


def words_of(tables: Iterable[Table], with_claims: bool) -> dict[str, str]:
    """The words that some tables use, with their meanings."""
    heads = {*ALWAYS, *(column for table in tables for column in table.columns), *(["claim"] if with_claims else [])}
    return {word: meaning for word, meaning in WORDS.items() if word in heads}
