"""A method that no product file knows: the network's biases alone are trained (BitFit, arXiv:2106.10199)."""

from pathlib import Path

from cache import write_tensors
from pipeline.plan.method import Method, Trainee

FILE = "biases.safetensors"


class Biases(Method):
    name, label = "biases", "Biases"
    result_files = (FILE,)

    def identity(self, plan):
        return {"biases": {}}

    def make(self, plan, frozen):
        trainee = self._trainee(plan, frozen)
        for parameter in trainee.trained:
            parameter.requires_grad = True
        trainee.save = self._save
        return trainee

    def load(self, plan, frozen, folder):
        import mindspore as ms
        from safetensors.numpy import load_file

        trainee, saved = self._trainee(plan, frozen), load_file(folder / FILE)
        for parameter in trainee.trained:
            parameter.set_data(ms.Tensor(saved[parameter.name]))
        return trainee

    def _trainee(self, plan, frozen):
        network = frozen[plan.family.network]
        biases = [parameter for parameter in network.get_parameters() if parameter.name.endswith(".bias")]
        predict = plan.family.prediction(transformer=network)
        return Trainee(frozen, {plan.family.network: network}, predict, biases, (self.name, network.proj_out))

    def _save(self, folder: Path, result, metadata):
        arrays = {name: parameter.asnumpy() for name, parameter in sorted(result.items())}
        shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        write_tensors(folder / FILE, shapes, arrays.values(), {"format": "pt"} | metadata)
        return folder / FILE

    def drawn_with(self, plan, folder):
        return {"biases": plan.store.facts.file_digest(folder / FILE)}

    def num_trained(self, experiment, family, config_of):
        return sum(outputs for _, outputs in family.network_layers(config_of(family.network)).values())


BIASES = Biases()
