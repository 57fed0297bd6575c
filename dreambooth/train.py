"""Training, from options to the result: the steps of every run, whatever its base model and method."""

import functools

from dreambooth.base_model.checks import check_family, check_parts, empty_models
from dreambooth.base_model.latents import latent_source
from dreambooth.base_model.loading import BaseModel
from dreambooth.base_model.moments import cache_moments
from dreambooth.base_model.process import build_sampler, noise_metadata, noise_process
from dreambooth.base_model.prompts import PromptStates, prompt_encoder
from dreambooth.base_model.source import load_scheduler, load_tokenizers
from dreambooth.data.crops import Crops
from dreambooth.data.dataset import DreamBoothDataset, build_loader, class_prompts_of, instance_prompts_of, prompts_of
from dreambooth.data.noise import noise_drawer
from dreambooth.data.order import samples_per_pass
from dreambooth.data.photos import read_instance_photos
from dreambooth.data.sources import own_captions, prompt_sources
from dreambooth.drawing.class_images import ensure_class_images
from dreambooth.family import Family
from dreambooth.loop.average import Average
from dreambooth.loop.optimizers import build_lr_scheduler, build_optimizer, check_optimizer, check_warmup
from dreambooth.loop.state import TrainingState
from dreambooth.loop.steps import Denoiser, count_steps, train_steps
from dreambooth.method import Corrected, Host, Method, trained_parameters
from dreambooth.options.training import TrainingConfig
from dreambooth.output.checkpoint import check_room, load_checkpoint, save_checkpoint, save_result
from dreambooth.output.folder import check_start, find_start, hold_folder, prepare_output
from dreambooth.output.identity import identify_run
from dreambooth.report.card import push_to_hub, save_card
from dreambooth.report.metrics import save_curves
from dreambooth.report.opening import opening_line
from dreambooth.report.page import save_page
from dreambooth.report.photos import PhotoScores
from dreambooth.report.progress import Progress
from dreambooth.report.samples import validate
from dreambooth.report.scores import Scores, prepare_scores, read_scored
from dreambooth.report.summary import save_summary
from dreambooth.runtime.accelerator import start_accelerator
from dreambooth.runtime.memory import explain_out_of_memory
from dreambooth.runtime.ranks import begin_alike, explain_lost_process
from dreambooth.runtime.stopping import Stop, ignore_signals
from dreambooth.tokens import warn_of_cut_prompts, words_of_subjects


@explain_lost_process()
def train(family: Family, method: Method, config: TrainingConfig) -> None:
    """Train `method` on a base model of `family`. `config` is an instance of `method.options` too.

    Writes the files listed in dreambooth/layout.py. Raises UserError or KroneckerError for what the user can fix. Ends
    the program with exit code 75 if it was told to stop and has saved a checkpoint.
    """
    accelerator = start_accelerator(config)
    with (
        Stop(config, accelerator) as stop,
        hold_folder(config, accelerator),
        explain_out_of_memory(config, accelerator),
    ):
        # Everything that can be refused is refused before any weights are read
        start = find_start(method, config, accelerator)
        check_optimizer(config)
        photos = read_instance_photos(config)
        samples = samples_per_pass(photos, config)
        references = read_scored(config)
        total_steps = count_steps(samples, config, accelerator.num_processes)
        check_start(start, method, total_steps, config, accelerator)
        check_warmup(config, total_steps)
        check_family(family, config)
        check_parts(config)
        process = noise_process(load_scheduler(config), config)
        text_trains = method.trains_text(config)
        empty = empty_models(config, (family.denoiser, *family.text_encoders))
        tokenizers, subject = load_tokenizers(config), words_of_subjects(config.all_subjects)
        method.check(Host(family, family.trained_models(empty, text_trains), tokenizers), photos, config)
        warn_of_cut_prompts(prompt_sources(photos, config), tokenizers.values(), config.max_token_length, subject)

        # The frozen model: class images, latents, distinct prompts. Components that are not needed are not read
        base = BaseModel(family, method.whole_precision, config, accelerator)
        pipeline, base_metadata = base.pipeline, noise_metadata(base.pipeline.scheduler)
        pipeline.scheduler = build_sampler(pipeline.scheduler)
        class_photos = ensure_class_images(base, config) if config.uses_class_images else []
        warn_of_cut_prompts(
            own_captions(class_photos, config.class_prompts), tokenizers.values(), config.max_token_length
        )
        run = identify_run(method, start, photos, class_photos, config, accelerator)
        prompts = prompts_of(photos, class_photos, config)
        crops = Crops(photos, class_photos, config)
        denoising = prepare_scores(references, class_photos, base, process, config)
        moments = cache_moments(crops, base.load_vae, config, accelerator)
        latents_of = latent_source(base, moments is not None, keep_vae=bool(config.validation_prompt))
        encode = prompt_encoder(base, prompts, text_trains, config)
        own, of_class = instance_prompts_of(photos), class_prompts_of(photos, class_photos, config)
        states = PromptStates(encode, prompts, own, of_class, family, base.device)

        # What trains
        models = family.trained_models(pipeline.components, text_trains)
        host = Host(family, models, family.present_tokenizers(pipeline.components))
        attached = method.attach(host, config, states)
        begin_alike(trained_parameters(attached), accelerator)
        base.prepare_training(models)
        optimizer = build_optimizer(attached.groups, config, accelerator.num_processes)
        if isinstance(attached, Corrected):
            optimizer.register_step_post_hook(lambda *_: attached.after_step())
        average = Average(optimizer, config.ema_decay) if config.ema_decay else None
        lr_scheduler = build_lr_scheduler(optimizer, config, total_steps)
        optimizer = accelerator.prepare_optimizer(optimizer)
        denoiser = Denoiser(base.denoiser, encode, family.condition)
        state = TrainingState(attached, optimizer, lr_scheduler, accelerator.scaler, average, base_metadata)

        check_room(state, total_steps, config)
        prepare_output(method, config, start, accelerator)
        step = first_step = load_checkpoint(start, state) if start else 0
        draw = noise_drawer(base.denoiser.config.in_channels, pipeline.vae_scale_factor, process.num_timesteps, config)
        dataset = DreamBoothDataset(crops, prompts, moments, config)
        rank, ranks = accelerator.process_index, accelerator.num_processes
        batches = build_loader(dataset, draw, config, rank, ranks, first_step, ignore_signals)
        reports = train_steps(
            accelerator, denoiser, latents_of, process, attached.without, batches, optimizer, lr_scheduler, config
        )

        photo_scores = PhotoScores(
            accelerator, dataset, draw, latents_of, process, base, encode, attached, optimizer, config
        )
        photo_scores.before_training()
        if accelerator.is_main_process:
            save_page(config)  # samples of later steps may have been removed
            print(opening_line(photos, class_photos, samples, first_step, total_steps, ranks, config), flush=True)
        progress = Progress(accelerator, dataset, config, first_step, total_steps)
        scores = Scores(denoising, base, encode, prompts, attached, optimizer, progress, config)
        show = functools.partial(validate, progress, pipeline, encode, prompts, optimizer, samples, config)
        save = functools.partial(save_checkpoint, accelerator, state, method.weights_name, run, config)
        show(step=first_step)  # also if it resumes: it may have been interrupted while drawing them
        stop.only_between_steps()
        for step in progress.steps(reports):
            stopping = stop.asked()
            scores.score(step)
            if stopping or step % config.checkpointing_steps == 0:
                progress.settle_steps()
                save(step=step, stopping=stopping)
                scores.keep_best(step, method.weights_name)
            if stopping:
                progress.close()
                stop.leave(step)
            show(step=step)
        path = save_result(accelerator, state, method.weights_name, step, config)
        scores.keep_best(step, method.weights_name, final=True)
        photo_scores.after_training()
        if accelerator.is_main_process:
            save_page(config)
            save_curves(config)
            save_card(path, attached, family, step, config)
            save_summary(path, method, attached, family, step, accelerator.device, ranks, config)
            progress.say_closing_line(attached, path)
        progress.close()
        if accelerator.is_main_process:
            push_to_hub(path, config)  # last: the other processes do not wait for it
