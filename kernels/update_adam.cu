// One step of Adam or AdamW on a flat bucket, in one pass; the formulas of torch.optim.Adam and AdamW:
//
//   gradient = gradient * gradient_scale + weight_decay * parameter       (Adam)
//   parameter *= 1 - learning_rate * weight_decay                         (AdamW: the decay is decoupled)
//   mean += mean_weight * (gradient - mean)
//   square = square_decay * square + square_weight * gradient^2
//   parameter -= step_size * mean / (sqrt(square) / square_correction + epsilon)
//
// Compiled with -DPARAMETER=<dtype> and -DGRADIENT=<dtype>, of the floats. Computed in float64 if one of them is
// float64, else in float32; the parameter is rounded once.
//
//   parameters    shape (count,); read and written
//   gradients     shape (count,); read only
//   mean, square  shape (count,), of the type that is computed in; read and written, zero before the first step
//   head          first element from which on groups of all arrays are aligned; `count` if there is none
//   kept          1 - learning_rate * weight_decay for AdamW, else 1
//   added_decay   weight_decay for Adam, else 0
//   mean_weight, square_decay, square_weight   1 - beta1, beta2, 1 - beta2
//   step_size, square_correction               learning_rate / (1 - beta1^step), sqrt(1 - beta2^step)
//   the rest      numbers of the type that is computed in
//
// Launch: blocks of THREADS, any number of them.

#include "elements.cuh"
#include "groups.cuh"

typedef CommonOf<PARAMETER, GRADIENT>::type Wide;

__device__ inline float32 square_root(float32 value) { return sqrtf(value); }
__device__ inline float64 square_root(float64 value) { return sqrt(value); }

struct AdamStep {
    PARAMETER* parameters;
    const GRADIENT* gradients;
    Wide *mean, *square;
    Wide kept, added_decay, mean_weight, square_decay, square_weight, step_size, square_correction, epsilon;
    Wide gradient_scale;

    template <int count>
    __device__ void run(int64 first) const {
        Group<PARAMETER, count> parameter = load_group<count>(parameters + first);
        const Group<GRADIENT, count> gradient = load_group<count>(gradients + first);
        Group<Wide, count> means = load_group<count>(mean + first);
        Group<Wide, count> squares = load_group<count>(square + first);
#pragma unroll
        for (int index = 0; index < count; ++index) {
            const Wide old = static_cast<Wide>(widen(parameter.at[index]));
            const Wide slope = static_cast<Wide>(widen(gradient.at[index])) * gradient_scale + added_decay * old;
            means.at[index] += mean_weight * (slope - means.at[index]);
            squares.at[index] = square_decay * squares.at[index] + square_weight * (slope * slope);
            const Wide divisor = square_root(squares.at[index]) / square_correction + epsilon;
            parameter.at[index] = narrow(kept * old - step_size * (means.at[index] / divisor), As<PARAMETER>());
        }
        store_group(mean + first, means);
        store_group(square + first, squares);
        store_group(parameters + first, parameter);
    }
};

KERNEL update_adam(PARAMETER* parameters, const GRADIENT* gradients, Wide* mean, Wide* square, int64 count, int64 head,
                   Wide kept, Wide added_decay, Wide mean_weight, Wide square_decay, Wide square_weight,
                   Wide step_size, Wide square_correction, Wide epsilon, Wide gradient_scale) {
    const AdamStep step = {
        parameters,   gradients,     mean,      square,            kept,    added_decay,    mean_weight,
        square_decay, square_weight, step_size, square_correction, epsilon, gradient_scale,
    };
    cover_with_grid<GroupOf<Wide>::count>(count, head, step);
}
