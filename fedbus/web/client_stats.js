// Statistics of each client over the rounds of a task: metrics, time, reliability, contribution.

const PARTS = ["train_s", "transfer_s", "wait_s"];

/** Loss or accuracy as reported by a client: of its evaluation if there is one, else of its training. */
export function clientMetric(round, client, name) {
  const figures = round.figures?.[client] ?? {};
  return [figures[`eval_${name}`], figures[`train_${name}`]].find((value) => typeof value === "number") ?? null;
}

/** By client, over *rounds*: {client, rounds, failed, reliability, contribution, train_s, transfer_s, wait_s, staleness, loss, accuracy}. */
export function clientStats(rounds) {
  const stats = new Map();
  const entry = (client) => {
    if (!stats.has(client)) stats.set(client, { client, rounds: 0, failed: 0, contributions: [], train_s: [], transfer_s: [], wait_s: [], staleness: [], loss: [], accuracy: [] });
    return stats.get(client);
  };
  for (const round of rounds) {
    for (const client of Object.keys(round.participants ?? {})) {
      const one = entry(client);
      one.rounds += 1;
      for (const part of PARTS) if (typeof round[part]?.[client] === "number") one[part].push(round[part][client]);
      if (typeof round.staleness?.[client] === "number") one.staleness.push(round.staleness[client]);
      if (typeof round.contributions?.[client] === "number") one.contributions.push(round.contributions[client]);
      for (const name of ["loss", "accuracy"]) {
        const value = clientMetric(round, client, name);
        if (value !== null) one[name].push(value);
      }
    }
    for (const client of Object.keys(round.failures ?? {})) entry(client).failed += 1;
  }
  return [...stats.values()].map((one) => ({ ...one, reliability: (one.rounds + 1) / (one.rounds + one.failed + 2), contribution: mean(one.contributions), staleness: mean(one.staleness), ...Object.fromEntries(PARTS.map((part) => [part, mean(one[part])])) }));
}

const mean = (values) => (values.length ? values.reduce((sum, one) => sum + one, 0) / values.length : null);
