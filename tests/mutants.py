"""Small wrong changes to the program, all of which the tests must notice: what is wrong, the right text, the wrong."""

MUTANTS = {
    # the loss
    "KL's arguments exchanged": ("F.kl_div(student, teacher,", "F.kl_div(teacher, student,"),
    "KL summed over the batch": ('reduction="batchmean"', 'reduction="sum"'),
    "the student's temperature missing": ("F.log_softmax(q_values / temperature,", "F.log_softmax(q_values,"),
    "the teacher's temperature missing": ("teacher_q_values.detach() / temperature", "teacher_q_values.detach()"),
    "Huber where the square is asked for": ("if huber else", "if not huber else"),
    "the student values the next observation": ("batch.next_obs, self.target_network)", "batch.next_obs)"),
    # lambda and schedules
    "lambda not clipped": (
        "float(np.clip(1 - (np.mean(returns) - baseline_return) / (teacher_return - baseline_return), 0, 1))",
        "float(1 - (np.mean(returns) - baseline_return) / (teacher_return - baseline_return))",
    ),
    "lambda of a single game": ("if len(returns) < 10:", "if len(returns) < 1:"),
    "lambda cut off a step late": ("step >= distill_steps", "step > distill_steps"),
    "the baseline forgotten": ("(np.mean(returns) - baseline_return)", "np.mean(returns)"),
    "lambda comes back after the latch": ("over = args.distill_latch or (", "over = ("),
    "epsilon of the online step": ("exploration_steps, global_step)", "exploration_steps, begin)"),
    "periodic work one step late": ("(step + stride) // every > step // every", "step // every > (step - 1) // every"),
    # the replay
    "gamma's exponent off by one": ("discounts = gamma**steps *", "discounts = gamma ** (steps - 1) *"),
    "rewards undiscounted": ("counted * gamma**ahead", "counted"),
    "termination ignored": (" * ~(terminations * counted).any(1)", ""),
    "a return across a termination": ("terminations.cumsum(1) - terminations + truncations", "truncations"),
    "a return across a truncation": ("- terminations + truncations.cumsum(1))", "- terminations)"),
    "a stack across a termination": (
        "(self.terminations[before] | self.truncations[before])",
        "(self.truncations[before])",
    ),
    "a stack across a truncation": (
        "(self.terminations[before] | self.truncations[before])",
        "(self.terminations[before])",
    ),
    "truncated steps drawn": (
        "cut.long().argsort(stable=True)[:batch_size]",
        "cut.long().argsort(stable=True)[-batch_size:]",
    ),
    "the newest row drawn": ("(self.written - n_step - oldest)", "(self.written - n_step + 1 - oldest)"),
    "a stack of overwritten frames": ("(self.written - self.rows + STACK - 1)", "(self.written - self.rows)"),
    "one environment never drawn": ("(draw() * self.num_envs).long()", "(draw() * (self.num_envs - 1)).long()"),
    "a return across a gap of games": (
        "[(self.written - 1) % self.rows] = True",
        "[(self.written - 1) % self.rows] |= False",
    ),
    # the games
    "a lost life taken for a game over": (
        "np.flatnonzero(ended).tolist()",
        "np.flatnonzero(ended | life_lost).tolist()",
    ),
    "a lost life does not end the episode": (
        "over | life_lost, truncated | self.forced",
        "over, truncated | self.forced",
    ),
    "clipped returns reported": ("self.returns += rewards", "self.returns += np.sign(rewards)"),
    "rewards not clipped": ("np.sign(rewards, dtype=np.float32)", "rewards.astype(np.float32)"),
    "launches learned from": ("truncated | self.forced, finished", "truncated, finished"),
    "lives not launched": (
        "self.launching[life_lost], self.launching[ended] = len(self.launch),",
        "self.launching[life_lost], self.launching[ended] = 0,",
    ),
    "another grey": ("interpolation=cv2.INTER_AREA", "interpolation=cv2.INTER_LINEAR"),
    "a stack begins with the last episode": (
        "first = (ended | life_lost | self.forced)",
        "first = (ended | self.forced)",
    ),
    "short games preferred": ("if left[env] > 0:", "if any(left):"),
    "evaluation explores": ("args.end_e if epsilon is None", "args.start_e if epsilon is None"),
    "evaluation of other games each time": (
        "torch.Generator(device).manual_seed(args.seed)\n    left",
        "torch.default_generator\n    left",
    ),
    # training
    "learning_starts in another unit": ("if step > learning_starts", "if global_step > learning_starts"),
    "one gradient step per vector step": ("step % args.train_frequency == 0:", "begin % args.train_frequency == 0:"),
    "a target update lost under a stride": (
        "step % args.target_network_frequency == 0:"
        "\n                learner.update_target(args.tau)\n        teacher_q",
        "begin % args.target_network_frequency == 0:"
        "\n                learner.update_target(args.tau)\n        teacher_q",
    ),
    "no target update at the end of the offline phase": ("        learner.update_target(tau=1.0)\n", ""),
    "tau ignored": ("list(self.q_network.parameters()), tau)", "list(self.q_network.parameters()), 1.0)"),
    "forced actions stored as the agent's": (
        "games.actions, *outcome, teacher_q_values)",
        "actions, *outcome, teacher_q_values)",
    ),
    "the teacher's Q-values of another observation": ("q_values_of_teacher(obs)", "q_values_of_teacher(obs.flip(0))"),
    "the offline phase without a teacher": (
        "learner.distill_weight.fill_(args.distill_coef)\n",
        "learner.distill_weight.fill_(0)\n",
    ),
    "the weight forgets distill_coef": ("fill_(args.distill_coef * coefficient)", "fill_(coefficient)"),
    "SPS counts offline steps": ("(begin + args.num_envs) / progress.seconds", "global_step / progress.seconds"),
    "a loss that is not finite goes on": ('if not math.isfinite(values.get("loss", 0.0)):', "if False:"),
    # checkpoints
    "the optimizer not restored": ('| {"state": saved["optimizer"]}', ""),
    "the generator not restored": ('            learner.generator.set_state(saved["generator"])\n', ""),
    "the checkpoint before is not kept": ("path.replace(before)", "path.unlink()"),
    "checkpoints written in place": ('part = path.with_name(path.name + ".part")', "part = path"),
    "points logged twice": ("purge_step=first_step", "purge_step=None"),
    "a model file may run code": (
        'torch.load(file, map_location="cpu", weights_only=True)',
        'torch.load(file, map_location="cpu", weights_only=False)',
    ),
    "a checkpoint may run code": (
        'torch.load(path, map_location="cpu", weights_only=True)\n        except',
        'torch.load(path, map_location="cpu", weights_only=False)\n        except',
    ),
    "a bundled teacher for a wrong name": (
        "            raise\n        except Exception:",
        "            pass\n        except Exception:",
    ),
}
