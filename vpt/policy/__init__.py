"""Policy training: rollouts by the engine, rewards, updates through the training forward."""
