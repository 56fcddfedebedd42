// One step of SGD with momentum on a flat bucket, in one pass; the formulas of torch.optim.SGD:
//
//   gradient = gradient * gradient_scale + weight_decay * parameter
//   momentum = momentum_decay * momentum + gradient_weight * gradient     (the gradient itself in the first step)
//   parameter -= learning_rate * (nesterov ? gradient + momentum_decay * momentum : momentum)
//
// Compiled with -DPARAMETER=<dtype> and -DGRADIENT=<dtype>, of the floats. Computed in float64 if one of them is
// float64, else in float32; the parameter is rounded once.
//
//   parameters  shape (count,); read and written
//   gradients   shape (count,); read only
//   momentum    shape (count,), of the type that is computed in; read (not in the first step) and written. Null for
//               plain SGD
//   head        first element from which on groups of all arrays are aligned; `count` if there is none
//   the rest    numbers of the type that is computed in, flags as int
//
// Launch: blocks of THREADS, any number of them.

#include "elements.cuh"
#include "groups.cuh"

typedef CommonOf<PARAMETER, GRADIENT>::type Wide;

struct MomentumStep {
    PARAMETER* parameters;
    const GRADIENT* gradients;
    Wide* momentum;
    Wide learning_rate, momentum_decay, gradient_weight, weight_decay, gradient_scale;
    bool is_nesterov, is_first;

    template <int count>
    __device__ void run(int64 first) const {
        Group<PARAMETER, count> parameter = load_group<count>(parameters + first);
        const Group<GRADIENT, count> gradient = load_group<count>(gradients + first);
        Group<Wide, count> velocity = {};
        if (momentum && !is_first) velocity = load_group<count>(momentum + first);
#pragma unroll
        for (int index = 0; index < count; ++index) {
            const Wide weight = static_cast<Wide>(widen(parameter.at[index]));
            const Wide slope = static_cast<Wide>(widen(gradient.at[index])) * gradient_scale + weight_decay * weight;
            Wide direction = slope;
            if (momentum) {
                velocity.at[index] =
                    is_first ? slope : momentum_decay * velocity.at[index] + gradient_weight * slope;
                direction = is_nesterov ? slope + momentum_decay * velocity.at[index] : velocity.at[index];
            }
            parameter.at[index] = narrow(weight - learning_rate * direction, As<PARAMETER>());
        }
        if (momentum) store_group(momentum + first, velocity);
        store_group(parameters + first, parameter);
    }
};

KERNEL update_momentum(PARAMETER* parameters, const GRADIENT* gradients, Wide* momentum, int64 count, int64 head,
                       Wide learning_rate, Wide momentum_decay, Wide gradient_weight, Wide weight_decay,
                       Wide gradient_scale, int is_nesterov, int is_first) {
    const MomentumStep step = {parameters,      gradients,    momentum,       learning_rate,    momentum_decay,
                               gradient_weight, weight_decay, gradient_scale, is_nesterov != 0, is_first != 0};
    cover_with_grid<GroupOf<Wide>::count>(count, head, step);
}
