"""One update of SAC, TD3, DDPG and DQN in float64 by torch's autograd and Adam, straight from the equations."""

from __future__ import annotations

import copy
import math

import torch


class ReferenceUpdate:
    """Float64 copies of an agent's networks, and updates of these.

    `priority` is the last update's mean over critics of |target - q|, `target` what its critics were to give.
    """

    loss_weights = None  # [critics] float64, on each critic's error

    def __init__(self, name, state, hyperparameters):
        self.name, self.h = name, hyperparameters
        self.critics, self.target_critics = (copy.deepcopy(q).double() for q in (state.critics, state.target_critics))
        rate = hyperparameters.learning_rate
        self.optimizers = {"critics": torch.optim.Adam(self.critics.parameters(), rate, foreach=False)}
        if name == "dqn":
            self.first_action = state.first_action
            return
        self.policy = copy.deepcopy(state.policy).double()
        slow = state.target_policy
        self.target_policy = None if slow is None else copy.deepcopy(slow).double()
        self.optimizers["policy"] = torch.optim.Adam(self.policy.parameters(), rate, foreach=False)
        self.low, self.high, self.half = (
            bound.double() for bound in (state.bounds.low, state.bounds.high, state.bounds.half_range)
        )
        if name == "sac":
            self.log_alpha = torch.zeros((), dtype=torch.float64, requires_grad=True)
            self.optimizers["entropy_coefficient"] = torch.optim.Adam([self.log_alpha], rate, foreach=False)

    def update(self, batch, key, policy_step):
        """Take one update on the batch, with the normals of the key's children."""
        observations, actions, following = (
            tensor.double() for tensor in (batch.observations, batch.actions, batch.next_observations)
        )
        rewards, discounts, weights = (
            tensor.double() for tensor in (batch.rewards, batch.discounts, batch.importance_weights)
        )
        target_key, policy_key = key.split(2)
        with torch.no_grad():
            target = rewards + discounts * self.next_value(following, target_key)
        if self.name == "dqn":
            columns = actions.long().unsqueeze(1) - self.first_action
            q = action_values(self.critics, observations).gather(1, columns).t()
        else:
            q = self.critics(observations, actions)
        self.target = target
        difference = target - q
        if self.h.huber_delta is None:
            error = difference**2
        else:
            delta = self.h.huber_delta
            inside = difference.abs() <= delta
            error = torch.where(inside, difference**2 / 2, delta * (difference.abs() - delta / 2))
        if self.loss_weights is not None:
            error = error * self.loss_weights.unsqueeze(1)
        self.critic_loss = (weights * error.sum(0)).mean()
        self.priority = difference.detach().abs().mean(0)
        self.descend("critics", self.critic_loss, self.critics)
        if policy_step and self.name != "dqn":
            self.policy_step(observations, policy_key)
        if self.name != "td3" or policy_step:
            self.follow(self.target_critics, self.critics)
            if self.name != "dqn" and self.target_policy is not None:
                self.follow(self.target_policy, self.policy)

    def next_value(self, following, key):
        if self.name == "dqn":
            best = action_values(self.critics, following).argmax(1, keepdim=True)
            return action_values(self.target_critics, following).gather(1, best).squeeze(1)
        if self.name == "sac":
            actions, log_prob = self.sample(self.policy, following, key)
            alpha = self.log_alpha.exp()
            return self.target_critics(following, actions).min(0).values - alpha * log_prob
        actions = self.target_policy(following)
        if self.name == "td3":
            noise = key.split(2)[1].normal(*actions.shape, dtype=torch.float64) * self.h.target_noise
            clip = self.h.target_noise_clip
            actions = (actions + noise.clamp(-clip, clip) * self.half).clamp(self.low, self.high)
        return self.target_critics(following, actions).min(0).values

    def sample(self, policy, observations, key):
        """Haarnoja et al. 2018, appendix C, with the density of the action in [-1, 1]."""
        mean, log_std = policy(observations)
        noise = key.normal(*mean.shape, dtype=torch.float64)
        before = mean + log_std.exp() * noise
        log_density = -(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2
        log_slope = 2 * (math.log(2) - before - torch.nn.functional.softplus(-2 * before))
        center, scale = policy.action_center, policy.action_scale
        return center + scale * before.tanh(), (log_density - log_slope).sum(1)

    def policy_step(self, observations, key):
        if self.name == "sac":
            actions, log_prob = self.sample(self.policy, observations, key)
            alpha = self.log_alpha.exp().detach()
            loss = (alpha * log_prob - self.critics(observations, actions).min(0).values).mean()
        else:
            loss = -self.critics(observations, self.policy(observations))[0].mean()
        self.policy_loss = loss.detach()
        self.descend("policy", loss, self.policy)
        if self.name == "sac":
            entropy_loss = -self.log_alpha * (log_prob.detach().mean() + self.target_entropy())
            self.descend("entropy_coefficient", entropy_loss, None)

    def target_entropy(self):
        given = self.h.target_entropy
        return -float(len(self.low)) if given is None else given

    def descend(self, name, loss, network):
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        self.critics.zero_grad() if name == "policy" else None
        if network is not None and self.h.max_gradient_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.h.max_gradient_norm)
        optimizer.step()

    def follow(self, target, online):
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.copy_(self.h.tau * fast + (1 - self.h.tau) * slow)


def action_values(network, observations):
    """``[batch, actions]``, past the encoder, which would make float32 of them; Wang et al. 2016, equation 9."""
    hidden = network.body(observations)
    advantages = network.advantages(hidden)
    if not network.dueling:
        return advantages
    return network.value(hidden) + advantages - advantages.mean(1, keepdim=True)
