"""What a job leaves behind: what was trained, what makes the model's inputs, and a summary."""

from ... import disk, files
from ...adapters.fsdp import whole_tensor
from ...adapters.save import save_adapter
from ...checkpoints.heads import write_labels
from ...checkpoints.kind import name_auto_class
from ...data.encoding import has_encoder
from ...data.prompt_form import write_form
from ..distributed import is_main
from ..modality import DrawingModality, KeepingModality
from ..trainer import AdapterTrainer
from .facts import count_parameters
from .load import Job


def _save_beside(job: Job) -> None:
    """Write what makes the model's inputs, and how it is asked, beside its adapter."""
    run = job.plan.run
    job.processor.save_pretrained(run.path)
    if (head := getattr(job.plan.modality, "head", None)) is not None:
        write_labels(run.path, head)
    if job.data.form is not None:
        write_form(run.path, job.data.form)
    if has_encoder(job.model) and job.model.can_generate():
        # with what a target begins, which the base may not say
        job.model.generation_config.save_pretrained(run.path)
    if isinstance(job.plan.modality, KeepingModality):
        job.plan.modality.keep(run.path)


def save_trained(job: Job, trainer: AdapterTrainer) -> None:
    """Write what was trained, which also marks the training as over."""
    run = job.plan.run
    write_summary(job, trainer, "finished")
    if job.plan.recipe.adapter.method != "full":
        if is_main():
            # first: the adapter's file marks the training as over
            _save_beside(job)
        # a model that is shared out is gathered by all, and written by the first
        if is_main() or trainer.shared_out:
            if isinstance(job.plan.modality, DrawingModality):
                job.plan.modality.save(job.model, run.path)
            save_adapter(job.model, run.path)
        return
    state = {name: whole_tensor(t) for name, t in job.model.state_dict().items()} if trainer.shared_out else None
    if not is_main():
        return
    with disk.replacing(run.path / "model") as part:
        job.model.save_pretrained(part, state_dict=state)
        job.processor.save_pretrained(part)
        if job.data.form is not None:
            write_form(part, job.data.form)
        run.list_as_written(f"model/{file.relative_to(part).as_posix()}" for file in part.rglob("*") if file.is_file())


def write_summary(job: Job, trainer: AdapterTrainer, status: str) -> None:
    """Write what was trained on what, how long, and how it ended: finished, interrupted or nan."""
    if not is_main():
        return
    recipe, meter, state = job.plan.recipe, trainer.meter, trainer.state
    changed, total = count_parameters(job.model)
    best = state.best_global_step if job.plan.args.load_best_model_at_end else None
    files.write_json(
        job.plan.run.summary,
        {
            "base_model": recipe.model.path,
            "auto_class": name_auto_class(type(job.model).__name__),
            "method": recipe.adapter.method,
            "trainable_parameters": changed,
            "total_parameters": total,
            "train_rows": job.data.train.report.kept,
            "dropped_rows": dict(job.data.train.report.dropped),
            "truncated_rows": job.data.train.report.truncated,
            "steps": state.global_step,
            "tokens": meter.tokens,
            "seconds": meter.seconds,
            "unit": meter.unit,
            "tokens_per_second": meter.tokens / meter.seconds if meter.seconds else 0.0,
            "best_step": best,
            "status": status,
        },
    )
