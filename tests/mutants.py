"""Small wrong changes to the program, all of which the tests must notice.

Each has a name, which says what is wrong, and two texts: the right one and the wrong one.
"""

MUTANTS = {
    # the loss
    "KL's arguments exchanged": (
        "student_log_probs, teacher_log_probs, log",
        "teacher_log_probs, student_log_probs, log",
    ),
    "KL summed over the batch": ('reduction="batchmean"', 'reduction="sum"'),
    "the student's temperature missing": (
        "F.log_softmax(q_values / temperature,",
        "F.log_softmax(q_values,",
    ),
    "the teacher's temperature missing": (
        "teacher_q_values.detach() / temperature",
        "teacher_q_values.detach()",
    ),
    "Huber where the square is asked for": ("    if huber:", "    if not huber:"),
    "the student values the next observation": (
        "partial(self.target_network, batch.next_obs)",
        "partial(self.q_network, batch.next_obs)",
    ),
    # lambda and schedules
    "lambda not clipped": ("student / teacher, 0, 1))", "student / teacher, -9e9, 9e9))"),
    "lambda of a single game": ("if len(scores) < GAMES_FOR_LAMBDA:", "if len(scores) < 1:"),
    "lambda cut off a step late": (
        "progress.step >= args.distill_steps",
        "progress.step > args.distill_steps",
    ),
    "lambda is not informed by the offline phase": ("= progress.scores[:GAMES_FOR_LAMBDA]", "= []"),
    "the baseline forgotten": (
        "student = np.mean(scores) - baseline_return",
        "student = np.mean(scores)",
    ),
    "lambda comes back after the latch": ("if args.distill_latch and lambda_ == 0:", "if False:"),
    "epsilon of the online step": (
        "exploration_steps, progress.global_step)",
        "exploration_steps, begin)",
    ),
    "periodic work one step late": (
        "end // every > begin // every",
        "(end - 1) // every > (begin - 1) // every",
    ),
    # the replay
    "gamma's exponent off by one": (
        "discounts=gamma**num_rewards *",
        "discounts=gamma ** (num_rewards - 1) *",
    ),
    "rewards undiscounted": ("counted * gamma**ahead", "counted"),
    "termination ignored": (" * bootstraps", ""),
    "a return across a termination": (
        "(terminations_before + exclusions_so_far) == 0",
        "exclusions_so_far == 0",
    ),
    "a return across a truncation": (
        "(terminations_before + exclusions_so_far) == 0",
        "terminations_before == 0",
    ),
    "a stack across a termination": ("self.terminations[before] | self", "self"),
    "a stack across a truncation": (
        "terminations[before] | self.excluded[before]",
        "terminations[before]",
    ),
    "truncated steps drawn": (
        "(~self.excluded[candidates % self.size])",
        "self.excluded[candidates % self.size]",
    ),
    "the newest row drawn": (
        "end = self.next_id - n_step *",
        "end = self.next_id - (n_step - 1) *",
    ),
    "a stack of overwritten frames": ("max((written + STACK - 1) *", "max(written *"),
    "one environment alone drawn": (
        "(end - self.oldest)).long()",
        "(end - self.oldest)).long() // self.num_envs * self.num_envs",
    ),
    "a return across a gap of games": (
        "[newest : newest + replay.num_envs] = True",
        "[newest : newest + replay.num_envs] |= False",
    ),
    # the games
    "a lost life taken for a game over": (
        "np.flatnonzero(ended)",
        "np.flatnonzero(ended | life_lost)",
    ),
    "a lost life does not end the episode": (
        "terminations=game_over | life_lost",
        "terminations=game_over",
    ),
    "clipped returns reported": ("self.scores += rewards", "self.scores += np.sign(rewards)"),
    "rewards not clipped": ("np.sign(rewards, dtype=np.float32)", "rewards.astype(np.float32)"),
    "launches learned from": ("excluded=truncated | self.forced", "excluded=truncated"),
    "lives not launched": (
        "self.forced_left[life_lost] = self.forced_after_life",
        "self.forced_left[life_lost] = 0",
    ),
    "another grey": ("interpolation=cv2.INTER_AREA", "interpolation=cv2.INTER_LINEAR"),
    "a stack begins with the last episode": ("begins = (ended | life_lost |", "begins = (ended |"),
    "short games preferred": ("if nth * num_envs + env < episodes:", "if nth < rounds:"),
    "evaluation explores": ("epsilon = args.end_e", "epsilon = args.start_e"),
    "evaluation of other games each time": (
        "manual_seed(int(seeds[0]))\n",
        "manual_seed(time.time_ns())\n",
    ),
    "the shortest games first": ("return scores.flatten()", "return np.sort(scores.flatten())"),
    "seeds that share games": (
        "[seed, PURPOSES.index(purpose), step]",
        "[PURPOSES.index(purpose), step]",
    ),
    "evaluation in the games of training": (
        'purpose: str = "evaluation"',
        'purpose: str = "online"',
    ),
    # training
    "learning_starts in another unit": (
        "if online_step > learning_starts",
        "if progress.global_step + online_step > learning_starts",
    ),
    "one gradient step per vector step": (
        "online_step % args.train_frequency == 0:",
        "begin % args.train_frequency == 0:",
    ),
    "a target update lost under a stride": (
        "            if online_step % args.target",
        "            if begin % args.target",
    ),
    "no target update at the end of the offline phase": (
        "learner.update_target(tau=1.0)",
        "",
    ),
    "tau ignored": ("online, tau)", "online, 1.0)"),
    "forced actions stored as the agent's": (
        "actions=self.actions,",
        "actions=np.where(self.forced, 3, self.actions),",
    ),
    "the teacher's Q-values of another observation": (
        "ask_teacher(obs)",
        "ask_teacher(obs.flip(0))",
    ),
    "the offline phase without a teacher": ("learner.set_lambda(1.0)", "learner.set_lambda(0.0)"),
    "the weight forgets distill_coef": (
        "fill_(self.args.distill_coef * lambda_)",
        "fill_(lambda_)",
    ),
    "SPS counts offline steps": (
        "end / progress.seconds",
        "progress.global_step / progress.seconds",
    ),
    "a loss that is not finite goes on": ("if not math.isfinite(loss):", "if False:"),
    "a buffer that is made changes the student": (
        "generator = run.teacher_generator",
        "generator = learner.generator",
    ),
    "Q-values of all actions logged": (
        '"q_values": q_taken.mean()',
        '"q_values": q_values.detach().mean()',
    ),
    # checkpoints
    "the optimizer not restored": ('| {"state": saved["optimizer"]}', ""),
    "the generator not restored": ('learner.generator.set_state(saved["generator"])', "pass"),
    "the checkpoint before is not kept": ("path.replace(before)", "path.unlink()"),
    "checkpoints written in place": (
        'part = Path(f"{path}.{os.urandom(4).hex()}.part")',
        "part = Path(path)",
    ),
    "points logged twice": ("purge_step=first_step", "purge_step=None"),
    "a file may run code": (
        'torch.load(file, map_location="cpu", weights_only=True)',
        "torch.load(file, weights_only=False)",
    ),
    # the rewriting's own
    "a game of the last evaluation too many": (
        "nth * num_envs + env < episodes",
        "nth * num_envs <= episodes",
    ),
    "a draw of too few hands out what has no successor": ("% num_valid\n", "\n"),
    "an evaluation is repeated after a resume": ("if progress.evaluated:", "if False:"),
    "a resumed phase begins with the games of its start": (
        'seeds_for("online", args.seed, args.num_envs, progress.step)',
        'seeds_for("online", args.seed, args.num_envs)',
    ),
    "the teacher's phase counted in logs": ('if self.phase != "teacher buffer":', "if True:"),
    "a checkpoint of the last phase counts in this one": ("        self.saved_step = 0\n", ""),
    "the learning rate no longer reaches Adam": (
        'self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate)',
        "pass",
    ),
    # teachers
    "the policy's temperature forgotten": ("state[name] *= temperature", "pass"),
    "quantiles added up": ("by_quantile.mean(0)", "by_quantile.sum(0)"),
    "another game's agent taken": ("its_actions != num_actions or", ""),
    "the learning rate does not follow": ("if final is not None:", "if final == 0:"),
    "a bundled teacher for a wrong name": (
        "if not hub_is_silent(error):\n                raise",
        "if not hub_is_silent(error):\n                pass",
    ),
    # what users ran into
    "any failure counts as a silent hub": (
        "return not names.isdisjoint(silent)",
        "return True",
    ),
    "the best model is that of the worst evaluation": (
        "mean > progress.best_return",
        "mean < progress.best_return",
    ),
    "the best model is written at every checkpoint": (
        "progress.evaluated and progress.best_step == progress.global_step",
        "True",
    ),
    "two processes in one directory": (
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
    ),
    "a failed film ends the run": (
        "            self.failed = True\n",
        "            raise\n",
    ),
    "an empty path starts a new training": (
        'if value == "" and flag != "hf_entity":',
        "if False:",
    ),
    "a needless folder is asked for on a resume": (
        'phase in (None, "teacher buffer")',
        "True",
    ),
    "nothing is learned online, and nothing is said": (
        "args.learning_starts < args.total_timesteps",
        "True",
    ),
}
