"""An update from a loss: the loop, the step, the engine. (Empty: the engine imports DeepSpeed.)"""
